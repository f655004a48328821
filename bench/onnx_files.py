"""Exported ONNX files in onnxruntime beside the weights here, on the CPU: differences, and the time of an image.

    pip install -r requirements-onnx.txt
    python config/main.py -a export -m photographs --format onnx
    python config/main.py -a export -m photographs --format onnx --precision fp16 --run photographs_fp16
    OMP_NUM_THREADS=2 python bench/onnx_files.py --onnx models/photographs.onnx models/photographs_fp16.onnx

The sizes are of random images. --images adds photographs. The time is that of the first of the sizes, all in turn.
onnxruntime gets as many threads as PyTorch has.
"""

import statistics
import sys
from collections import deque
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "config"))

import base.openmp  # noqa: F401

import numpy as np
import torch
from torch import Tensor

from base.console import Parser, run_script
from base.errors import MissingFile
from base.images import read_image, to_bgr8
from dataset import to_tensor
from runs.restore import open_network, restore
from timing import alternate

SIZES = ("481x321", "1x1", "3x2", "33x17", "120x101")  # the first is timed


def session(path: str) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError:
        raise MissingFile("this needs some packages: pip install -r requirements-onnx.txt") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def images(sizes: list[str], paths: list[Path]) -> dict[str, Tensor]:
    """BGR images (3, H, W) in [0, 1] by name: random ones of these sizes, WxH, and files."""
    generator = torch.Generator().manual_seed(0)
    shapes = {size: tuple(map(int, size.split("x"))) for size in sizes}
    found = {size: torch.rand(3, height, width, generator=generator) for size, (width, height) in shapes.items()}
    return found | {path.name: to_tensor(to_bgr8(read_image(path))).float() / 255 for path in paths}


def main(arguments: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("-m", "--model", default="photographs", help="weights; default: %(default)s")
    parser.add_argument("--onnx", nargs="+", required=True, metavar="FILE", help="exported from these weights")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="WxH", help="of random images")
    parser.add_argument("--images", nargs="+", type=Path, default=[], metavar="FILE", help="more images")
    parser.add_argument("--repeats", type=int, default=7, help="timings of each; default: %(default)s")
    known = parser.parse_args(arguments)
    network = open_network(None, known.model, {"device": "cpu"}).network
    sessions = {Path(path).name: session(path) for path in known.onnx}
    shown = images(known.sizes, known.images)
    print("| file | image | largest difference, of 255 levels | 99.9th percentile |\n|---|---|---|---|")
    for name, O in shown.items():
        (wanted,) = deque(restore(network, O), 1)
        for file, run in sessions.items():
            found = run.run(None, {"image": O.flip(0)[None].numpy()})[0][0, ::-1]
            apart = 255 * np.abs(found - wanted.numpy())
            print(f"| {file} | {name} | {apart.max():.5f} | {np.quantile(apart, 0.999):.5f} |", flush=True)
    O = shown[known.sizes[0]]
    given = {"image": np.ascontiguousarray(O.flip(0)[None].numpy())}
    runs = {file: lambda run=run: run.run(None, given) for file, run in sessions.items()}
    runs["here"] = lambda: deque(restore(network, O), 0)
    seconds = alternate(runs, torch.device("cpu"), known.repeats, 0)
    print(f"\n| {known.sizes[0]}, {torch.get_num_threads()} thread(s) | median, s | min .. max |\n|---|---|---|")
    for name, found in seconds.items():
        print(f"| {name} | {statistics.median(found):.2f} | {min(found):.2f} .. {max(found):.2f} |")


if __name__ == "__main__":
    run_script(main)

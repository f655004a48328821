"""How time and memory of restoring an image grow with its size: S-DSEN, eight stages, 0.15 to 12 megapixels.

    python bench/growth.py                     # the table, about ten minutes on two cores
    python bench/growth.py --memory_gib 4      # the same with the process held to 4 GiB

Each size runs in a process of its own, whose peak memory includes Python and PyTorch.
"""

import argparse
import json
import subprocess
import sys
from collections import deque
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "config"))

import base.openmp  # noqa: F401

import torch

import model
from runs.restore import Restoring, restore
from timing import first_call

SIZES = [(481, 321), (894, 671), (1789, 1342), (4000, 3000)]


def measure(width: int, height: int, memory_gib: float) -> dict[str, float]:
    """Seconds and peak memory, bytes, of one random image through initial weights."""
    torch.manual_seed(0)
    network = model.build("sdsen").eval()
    O = torch.rand(3, height, width)
    _, numbers = first_call(lambda: deque(restore(network, O, Restoring(memory_gib)), 0), torch.device("cpu"))
    return {"seconds": numbers["seconds"], "peak": numbers["before"] + numbers["added"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory_gib", type=float, default=0.0, help="bound of the process's memory; 0: what is free")
    parser.add_argument("--sizes", nargs="+", metavar="WxH", default=[f"{width}x{height}" for width, height in SIZES])
    parser.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.one:
        print(json.dumps(measure(*known.one, known.memory_gib)))
        return
    print("| pixels | megapixels | seconds | seconds per megapixel | peak memory, GiB |\n|---|---|---|---|---|")
    for size in known.sizes:
        width, height = map(int, size.split("x"))
        command = [sys.executable, __file__, "--one", str(width), str(height), f"--memory_gib={known.memory_gib}"]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        seconds, megapixels = found["seconds"], width * height / 1e6
        print(
            f"| {size} | {megapixels:.2f} | {seconds:.1f} | {seconds / megapixels:.1f} | {found['peak'] / 2**30:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

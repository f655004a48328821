"""Remove the rain from images, and make a page that compares them.

    python show.py -i photo.jpg DIR   # your own images, with the pretrained weights `photographs`
    python show.py -m RUN             # the test set of that run's data set, with scores

Results are written to `showdir/RUN/` under the input's name and in the input's format: grey, alpha and 16 bits are
kept. JPEG and WebP are written at quality 95; scores are taken before. The page, `showdir/RUN/index.html`, compares all
images there. `python show.py -h` lists the settings.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from base import ranks
from base.console import in_terminal, log, run_script, set_up_log
from base.devices import is_out_of_memory, pick_device
from base.errors import BadArgument, MissingFile, Occupied, OutOfMemory, UserError
from base.images import SUFFIXES, list_images, read_image, read_pair, write_image
from base.options import make_parser
from cal_ssim import scores
from dataset import data_path, list_pairs, to_tensor
from fast.graphs import replaying
from gallery.gallery import Gallery
from runs.restore import NEARLY_INPUT, Restoring, open_network, restore
from settings import FIELDS, Settings, read_overrides

ANY_DEPTH = (".png", ".tif", ".tiff")  # formats that hold 16 bits and alpha
PRETRAINED = "photographs"  # the weights that are used by default
OPTIONS = (
    "data_dir model_dir show_dir run device precision memory_gib mirror cuda_graphs log_level".split()
)  # in the help


@dataclass
class Restored:
    """One image before and after, in cv2's order."""

    image: np.ndarray  # (H, W), (H, W, 3) or (H, W, 4), uint8 or uint16
    stages: list[np.ndarray]  # the restored image after each stage, of the shape and type of `image`
    ground_truth: np.ndarray | None  # (H, W, 3) uint8, if there is one
    scores: list[dict[str, float]]  # of the input, then after each stage; empty without ground truth
    change: float  # mean absolute difference of input and last stage, of 255 levels
    seconds: float  # of the network


def to_network(image: np.ndarray) -> Tensor:
    """(H, W), (H, W, 3) or (H, W, 4), uint8 or uint16 -> (3, H, W) float32 in [0, 1]; alpha is left out."""
    colour = np.repeat(image[..., None], 3, 2) if image.ndim == 2 else image[..., :3]
    samples = np.ascontiguousarray(colour.transpose(2, 0, 1), np.float32)
    return torch.from_numpy(samples) / np.iinfo(image.dtype).max


def from_network(restored: Tensor, image: np.ndarray) -> np.ndarray:
    """(3, H, W) in [0, 1] -> shape and type of `image`: grey is the channels' mean, alpha is copied from `image`."""
    if image.ndim == 2:
        restored = restored.mean(0, keepdim=True)
    samples = restored.mul(np.iinfo(image.dtype).max).round().cpu().numpy().astype(image.dtype)
    samples = np.ascontiguousarray(samples.transpose(1, 2, 0))
    return samples[..., 0] if image.ndim == 2 else np.concatenate([samples, image[..., 3:]], 2)


def derain(
    network: nn.Module, path: Path, paired: bool, device: torch.device, how: Restoring, stage_num: int
) -> Restored:
    """An image, or the rainy half of a joined pair (`paired`), restored by `stage_num` stages. Raises UserError."""
    ground_truth, image = read_pair(path) if paired else (None, read_image(path))
    started = time.perf_counter()
    try:
        O = to_network(image).to(device)
        stages = [from_network(restored, image) for restored in restore(network, O, how, stage_num)]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"{path} is too large for the memory of {device}: make it smaller") from None
    seconds = time.perf_counter() - started
    change = cv2.norm(image, stages[-1], cv2.NORM_L1) / image.size / np.iinfo(image.dtype).max * 255
    rows = []
    if paired:
        rows = [scores(to_tensor(x).to(device), to_tensor(ground_truth)) for x in (image, *stages)]
    return Restored(image, stages, ground_truth, rows, change, seconds)


def find_inputs(given: list[str] | None, settings: Settings) -> list[Path]:
    """The files to restore, each once: those of the `given` files and folders, or the test set's pairs."""
    if given is None:
        return list_pairs(data_path(settings) / "test")
    paths: dict[Path, Path] = {}  # by the resolved path, so that an image that is named twice is restored once
    for path in (Path(word).expanduser() for word in given):
        files = list_images(path) if path.is_dir() else [path] if path.exists() else []
        if not files:
            raise MissingFile(f"{path} is missing or holds no images ({', '.join(sorted(SUFFIXES))})")
        paths.update((file.resolve(), paths.get(file.resolve(), file)) for file in files)
    return list(paths.values())


def result_stems(paths: list[Path], stage_num: int) -> list[str]:
    """The stems of the results' names: the inputs', with _2, _3, ... where an earlier result has such a name.

    The names of `stage_num` stages are kept free as well.
    """
    stems: list[str] = []
    taken: set[str] = set()
    for path in paths:
        suffixes = {path.suffix, path.suffix if path.suffix.lower() in ANY_DEPTH else ".png"}  # see `result_suffix`
        for count in itertools.count(1):
            stem = path.stem if count == 1 else f"{path.stem}_{count}"
            # On some file systems A.png and a.png are one file.
            names = {f"{name}{suffix}".casefold() for name in stage_names(stem, stage_num) for suffix in suffixes}
            if not names & taken:
                break
        taken |= names
        stems.append(stem)
    return stems


def stage_names(stem: str, stage_num: int) -> list[str]:
    """The stems of a result and of its `stage_num` stages."""
    return [stem, *(f"{stem}_stage{t}" for t in range(1, stage_num + 1))]


def result_suffix(path: Path, image: np.ndarray) -> str:
    """The input's suffix, or .png where its format can't be written, or can't hold the image's depth or alpha."""
    suffix = path.suffix.lower()
    too_deep = image.dtype == np.uint16 and suffix not in ANY_DEPTH
    too_many = image.shape[2:] == (4,) and suffix in (".jpg", ".jpeg")
    return ".png" if suffix not in SUFFIXES or too_deep or too_many else path.suffix


def summarize(items: Sequence[Restored]) -> str:
    """The mean scores if there are any, and the network's mean time."""
    parts = [f"{np.mean([item.seconds for item in items]):.2f} s per image"]
    for name, text in (("psnr", "PSNR {:.2f} -> {:.2f} dB"), ("ssim", "SSIM {:.4f} -> {:.4f}")):
        rows = [(item.scores[0][name], item.scores[-1][name]) for item in items if item.scores]
        rows = [row for row in rows if not np.isnan(row[0])]  # an image smaller than SSIM's window has none
        parts += [text.format(*np.mean(rows, 0))] if rows else []
    return ", ".join(parts)


def main(arguments: list[str]) -> int:
    parser = make_parser({name: FIELDS[name] for name in OPTIONS}, "Remove rain from images and make a page of them.")
    parser.add_argument("-p", "--preset", help="open the run of this preset's name")
    text = "a run (its best state), RUN/latest, RUN/step_N, pretrained weights by name, a file; default: photographs"
    parser.add_argument("-m", "--model", help=text)
    parser.add_argument("-i", "--input", nargs="+", action="extend", metavar="PATH", help="images, folders of images")
    parser.add_argument("--stages", type=int, metavar="K", help="stop after stage K: faster, but worse")
    parser.add_argument("--all-stages", action="store_true", help="write every stage, as NAME_stage1 and so on")
    known, words = parser.parse_known_args(arguments)
    if words and not words[0].startswith("-"):
        raise BadArgument(f"{words[0]!r} stands alone: images are given with -i, settings as --name value")
    overrides = read_overrides(words)
    set_up_log(overrides.get("log_level", "info"))
    with ranks.joined():
        return show(known, overrides)


def show(known: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Restore what the command line names; returns the exit status. Several ranks share the images."""
    model = known.model or (None if known.preset or "run" in overrides else PRETRAINED)
    opened = open_network(known.preset, model, overrides)
    network, settings, checkpoint, step = opened
    log.info(f"{checkpoint} (step {step})")
    stage_num = network.output_num if known.stages is None else known.stages
    if not 1 <= stage_num <= network.output_num:
        raise BadArgument(f"--stages must be 1 to {network.output_num}, the stages of {checkpoint}, got {stage_num}")
    paths, show_dir = find_inputs(known.input, settings), Path(settings.show_dir)
    folder = show_dir / (overrides.get("run") or opened.name)
    written_to = {place.resolve() for place in (show_dir, folder, folder / "page")}
    if inside := [path for path in paths if {path.parent.resolve(), path.resolve().parent} & written_to]:
        raise Occupied(f"{inside[0]} is in a folder that results are written to: name another one with --show_dir")
    name = f"{checkpoint.parent.name}/{checkpoint.name}"
    device, gallery = pick_device(settings.device), ranks.from_first(lambda: Gallery(folder, name, step))
    log.info(f"{stage_num} of {network.output_num} stages, {len(paths)} images, {device}")

    written = stage_num if known.all_stages else 0
    mine = ranks.share(list(zip(paths, result_stems(paths, written), strict=True)))
    results: list[Restored | None] = []  # None where an image was skipped
    bar = tqdm(mine, unit="image", disable=not in_terminal(), dynamic_ncols=True)
    with gallery, replaying(network, device), logging_redirect_tqdm([log] if in_terminal() else []):
        for path, stem in bar:
            try:
                item = derain(network, path, known.input is None, device, Restoring.of(settings), stage_num)
            except UserError as error:
                log.warning(f"skipped: {error}")
                results.append(None)
                continue
            result = write_result(item, path, folder, stem, written)
            facts = (item.ground_truth, item.scores, item.change, item.seconds)
            gallery.add(path, folder / result, [item.image, *item.stages], *facts)
            item.image, item.stages, item.ground_truth = np.empty(0), [], None  # memory for the next image
            results.append(item)
    items = [item for item in ranks.gather(results) if item is not None]
    if not ranks.is_first():
        return 0
    if not items:
        log.warning("no image was restored; the page was left as it was")
        return 1
    if close := sum(item.change < NEARLY_INPUT for item in items):
        log.warning(f"warning: {close} of {len(items)} results are nearly their input: no rain, or little training")
    log.info(f"{summarize(items)}\nresults: {folder}\npage: {gallery.page}")
    return int(len(items) < len(paths))


def write_result(item: Restored, path: Path, folder: Path, stem: str, stage_num: int) -> str:
    """Write an image's result, and `stage_num` of its stages, to `folder`; returns the result's name."""
    suffix = result_suffix(path, item.image)
    for name, image in zip(stage_names(stem, stage_num), [item.stages[-1], *item.stages], strict=False):
        write_image(folder / f"{name}{suffix}", image)
    if not in_terminal():
        log.info(f"{path.name}: {item.image.shape[1]}x{item.image.shape[0]}, {summarize([item])}")
    return f"{stem}{suffix}"


if __name__ == "__main__":
    run_script(main)

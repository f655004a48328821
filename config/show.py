"""Remove the rain from images, and make a page that compares them.

    python show.py -i photo.jpg DIR   # your own images, with the pretrained weights `photographs`
    python show.py -m RUN             # the test set of that run's data set, with scores

Results are written to `showdir/RUN/` under the input's name and in the input's format: grey, alpha and 16 bits are
kept. JPEG and WebP are written at quality 95; scores are taken before. The page, `showdir/index.html`, shows the last
call's images; it is show.html with its facts as JSON. `python show.py -h` lists the settings.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from base import ranks
from base.console import in_terminal, log, run_script, set_up_log
from base.devices import is_out_of_memory, pick_device
from base.errors import BadArgument, MissingFile, NotFinite, Occupied, OutOfMemory, UserError
from base.files import write_bytes
from base.images import SUFFIXES, list_images, read_image, read_pair, to_bgr8, write_image
from base.options import make_parser
from cal_ssim import scores
from dataset import data_path, list_pairs, to_tensor
from fast.graphs import replaying
from runs.restore import NEARLY_INPUT, Restoring, open_network, restore
from settings import FIELDS, Settings, read_overrides

ANY_DEPTH = (".png", ".tif", ".tiff")  # formats that hold 16 bits and alpha
TEMPLATE = Path(__file__).with_name("show.html")
MARK = b'<meta name="generator" content="S-DSEN show.py">'  # an index.html without it is not replaced
PRETRAINED = "photographs"  # the weights that are used by default
LARGEST = 1600  # side of a preview, pixels
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
    except NotFinite as error:
        raise NotFinite(f"{path}: {error}") from None
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


def rain_layer(O: np.ndarray, restored: np.ndarray) -> tuple[np.ndarray, int]:
    """The rain layer O - restored of two (H, W, 3) uint8 images, made visible: (H, W, 3) uint8 and its gain.

    The gain is the largest of 1, 2, 4, 8 and 16 that clips at most 1 % of the samples. Negative samples are black.
    """
    rain = cv2.subtract(O, restored)  # clips at 0
    peak = max(1.0, float(np.percentile(rain, 99)))
    gain = max(g for g in (1, 2, 4, 8, 16) if g == 1 or g * peak <= 255)
    return cv2.convertScaleAbs(rain, alpha=gain), gain


class Gallery:
    """The previews of images, one after another, and at the end the page."""

    def __init__(self, show_dir: Path):
        """Choose the previews' folder. Raises Occupied where there is an index.html that show.py did not write."""
        self.show_dir, self.page = show_dir, show_dir / "index.html"
        if self.page.exists() and MARK not in self.page.read_bytes():
            raise Occupied(f"{self.page} was not written by show.py and is kept: name another folder with --show_dir")
        self.former = [path for path in (show_dir / "page").glob("*") if path.name.isdecimal()]
        self.folder = show_dir / "page" / str(1 + max((int(path.name) for path in self.former), default=0))

    def entry(self, number: int, item: Restored, source: Path, result: str) -> dict[str, Any]:
        """Write the previews of image `number` and return its part of the page.

        `source` is the file it was read from, `result` the file it was written to, relative to show_dir.
        """
        O, *stages = (to_bgr8(image) for image in (item.image, *item.stages))
        layer, gain = rain_layer(O, stages[-1])
        pictures = {"Input": O, **{f"Stage {t}": stage for t, stage in enumerate(stages, 1)}, "Rain layer": layer}
        if item.ground_truth is not None:
            pictures["Ground truth"] = item.ground_truth
        urls = [self._preview(f"{number}_{index}", picture) for index, picture in enumerate(pictures.values())]
        views: list[dict[str, Any]] = [{"label": label, "url": url} for label, url in zip(pictures, urls, strict=True)]
        for view, row in zip(views, item.scores, strict=False):  # the input and the stages come first
            view["scores"] = [_finite(row["psnr"]), _finite(row["ssim"])]
        readable = Path(os.fsencode(source).decode(errors="replace"))  # the bytes of a name may be no UTF-8
        return {
            "name": readable.name,
            "source": str(readable),
            "result": quote(os.fsencode(result)),
            "width": O.shape[1],
            "height": O.shape[0],
            "change": round(item.change, 3),
            "gain": gain,
            "last": len(stages),  # index of the result in `views`
            "views": views,
        }

    def write(self, **facts: Any) -> None:
        """Write the page of these facts, which show.html reads, and remove the previews of the last page."""
        # "<" is escaped, so that no file name can end the script that holds the JSON.
        text = json.dumps(facts, allow_nan=False).replace("<", "\\u003c")
        write_bytes(self.page, TEMPLATE.read_text(encoding="utf-8").replace("{{facts}}", text).encode())
        for folder in self.former:
            shutil.rmtree(folder, ignore_errors=True)

    def _preview(self, name: str, picture: np.ndarray) -> str:
        scale = min(1.0, LARGEST / max(picture.shape[:2]))
        height, width = (max(1, round(scale * side)) for side in picture.shape[:2])
        path = self.folder / f"{name}.jpg"
        write_image(path, cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA))
        return path.relative_to(self.show_dir).as_posix()


def _finite(score: float) -> float | None:
    """A score for JSON, which has neither nan nor inf: null, and 999 dB for equal images."""
    return None if math.isnan(score) else min(round(score, 4), 999.0)


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
    written_to = {place.resolve() for place in (show_dir, folder, show_dir / "page")}
    if inside := [path for path in paths if {path.parent.resolve(), path.resolve().parent} & written_to]:
        raise Occupied(f"{inside[0]} is in a folder that results are written to: name another one with --show_dir")
    device, gallery = pick_device(settings.device), ranks.from_first(lambda: Gallery(show_dir))
    log.info(f"{stage_num} of {network.output_num} stages, {len(paths)} images, {device}")

    written = stage_num if known.all_stages else 0
    mine = ranks.share(list(enumerate(zip(paths, result_stems(paths, written), strict=True), 1)))
    results = []  # of each image an item and its entry in the page, or None where it was skipped
    bar = tqdm(mine, unit="image", disable=not in_terminal(), dynamic_ncols=True)
    with replaying(network, device), logging_redirect_tqdm([log] if in_terminal() else []):
        for number, (path, stem) in bar:
            try:
                item = derain(network, path, known.input is None, device, Restoring.of(settings), stage_num)
            except UserError as error:
                log.warning(f"skipped: {error}")
                results.append(None)
                continue
            result = write_result(item, path, folder, stem, written)
            entry = gallery.entry(number, item, path, f"{folder.name}/{result}")
            item.image, item.stages, item.ground_truth = np.empty(0), [], None  # memory for the next image
            results.append((item, entry))
    results = [both for both in ranks.gather(results) if both is not None]
    if not ranks.is_first():
        return 0
    if not results:
        shutil.rmtree(gallery.folder, ignore_errors=True)
        log.warning("no image was restored; the page was left as it was")
        return 1
    items, entries = zip(*results, strict=True)
    name, summary = f"{checkpoint.parent.name}/{checkpoint.name}", summarize(items)
    gallery.write(images=entries, checkpoint=name, step=step, stages=stage_num, summary=summary)
    if close := sum(item.change < NEARLY_INPUT for item in items):
        log.warning(f"warning: {close} of {len(items)} results are nearly their input: no rain, or little training")
    log.info(f"{summary}\nresults: {folder}\npage: {gallery.page}")
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

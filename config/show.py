"""Remove the rain from images, and make a page that compares them.

    python show.py -i photo.jpg DIR   # your own images, with the pretrained weights `photographs`
    python show.py -m RUN             # the test set of that run's data set, with scores

Results are written to `showdir/RUN/`, or to --output, under the input's name and in the input's format: grey, alpha, 16
bits, EXIF and the colour profile are kept, what else is lost is named. JPEG, WebP and AVIF are written at quality 95;
scores are taken before. The page, `showdir/RUN/index.html`, compares all images there. `show.py -h` lists the settings.
"""

import base.openmp  # noqa: F401

import argparse
import itertools
import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from base import ranks
from base.console import Progress, in_terminal, log, printable, run_script, set_up_log
from base.devices import is_out_of_memory, pick_device
from base.errors import BadArgument, BadName, MissingFile, NotFinite, NotWritable, Occupied, OutOfMemory, UserError
from base.images import SUFFIXES, WRITABLE, Picture, kind_of, read_pair, read_picture, survey, to_8bit, write_image
from base.metadata import JPEG, NAMES, TIFF, held
from base.options import make_parser
from cal_ssim import scores
from dataset import data_path, list_pairs, to_tensor
from fast.graphs import replaying
from gallery.gallery import Gallery, read_entries, readable
from runs.restore import NEARLY_INPUT, Restoring, open_network, restore
from settings import FIELDS, Settings, read_overrides

ANY_DEPTH = {".png", *TIFF}  # formats that hold 16 bits and alpha
PAGE = {"index.html", "page"}  # names that the page and the list of pages have for themselves
PRETRAINED = "photographs"  # the weights that are used by default
OPTIONS = "data_dir model_dir show_dir run device precision memory_gib mirror cuda_graphs log_level".split()  # in help


@dataclass
class Restored:
    """One image before and after, in cv2's order."""

    image: np.ndarray  # (H, W), (H, W, 3) or (H, W, 4), uint8 or uint16
    stages: list[np.ndarray]  # the restored image after each stage, of the shape and type of `image`
    ground_truth: np.ndarray | None  # (H, W, 3) uint8, if there is one
    scores: list[dict[str, float]]  # of the input, then after each stage; empty without ground truth
    change: float  # mean absolute difference of input and last stage, of 255 levels
    seconds: float  # of the network
    source: Path
    metadata: dict[int, bytes]  # EXIF and colour profile, as of `read_picture`
    lost: list[str]  # what of the source is not in the result's file, in a few words each


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
    ground_truth, rainy = read_pair(path) if paired else (None, None)
    picture = read_picture(path) if rainy is None else Picture(rainy, {}, [])
    image = picture.image
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
    return Restored(image, stages, ground_truth, rows, change, seconds, path, *picture[1:])


def find_inputs(given: list[str] | None, settings: Settings, recursive: bool, places: list[Path]) -> dict[Path, Path]:
    """The files to restore, each once: those of the `given` files and folders, or the test set's pairs.

    For each the folder of its result, below that of all results: "." unless it was found in a folder's folder.
    The `places` of results are not searched.
    """
    if given is None:
        return dict.fromkeys(list_pairs(data_path(settings) / "test"), Path())
    found: dict[Path, tuple[Path, Path]] = {}  # by the resolved path, as an image that is named twice is restored once
    for path in map(to_path, given):
        files, left_out = survey(path, recursive, places)
        log_groups("left out", [(reason, entry) for entry, reason in left_out.items()])
        if "a folder" in left_out.values():
            log.info("--recursive reads the images in folders as well")
        if not files and (os.path.isdir(path) or not os.path.exists(path)):
            missing = "is a link to nothing" if os.path.islink(path) else "is missing"
            raise MissingFile(f"{path} {'holds no image' if os.path.isdir(path) else missing}")
        for file in files or [path]:
            real = file.resolve()
            if real not in found or _place(found[real][0]) != real == _place(file):  # not a link, if there is the file
                found[real] = file, file.parent.relative_to(path) if files else Path()
    return dict(found.values())


def to_path(word: str) -> Path:
    """A path of the command line, where ~ means the home folder; of an unknown user it means nothing."""
    return Path(os.path.expanduser(word))


def log_groups(title: str, named: Iterable[tuple[str, Path]]) -> None:
    """Print the files of each reason: three of them, or all with --log_level debug."""
    groups: dict[str, list[str]] = {}
    for reason, path in named:
        groups.setdefault(reason, []).append(printable(path))
    for reason, names in groups.items():
        count = len(names) if log.isEnabledFor(logging.DEBUG) else 3
        more = f" and {len(names) - count} more" if len(names) > count else ""
        log.info(f"{title}, {reason}: {', '.join(names[:count])}{more}")


def place_results(
    inputs: dict[Path, Path], output: Path | None, folder: Path, stage_num: int
) -> list[tuple[Path, Path]]:
    """Each input with its result: in the folder or, if there is one input, the file `output`, else in `folder`.

    There, no result of an earlier call is replaced, unless it has the same source. Raises BadArgument, or Occupied
    where a result might replace an input.
    """
    place, pages = output or folder, {folder.resolve(), folder.parent.resolve()}
    for path in (folder, place):
        if path.name.casefold() in PAGE and path.parent.resolve() in pages:
            raise BadArgument(f"results can't be in {path}, a name of the page's own files: take another one")
    if output and output.suffix.lower() in SUFFIXES and not os.path.isdir(output):
        if output.suffix.lower() not in WRITABLE or len(inputs) > 1:
            choices = ", ".join(sorted(WRITABLE))
            raise BadArgument(f"--output {output}: name a folder, or for one image a file ({choices})")
        results = [output]
    elif os.path.exists(place) and not os.path.isdir(place):
        raise BadArgument(f"results can't be written to {place}: it is a file")
    else:
        inside = {path: _beside_page(inner) for path, inner in inputs.items()} if place.resolve() in pages else inputs
        results = [place / name for name in result_names(inside, stage_num, {} if output else _taken(folder))]
    files = {_place(file) for result in results for file in (result, *stage_files(result, stage_num))}
    folders = {place.resolve(), folder.parent.resolve(), folder.resolve() / "page"}
    for path, inner in inputs.items():
        places = {path.resolve(), _place(path)}
        searched = {above for place in places for above in place.parents[: 1 + len(inner.parts)]}
        if files & places or folders & searched:
            raise Occupied(f"{path} is where results are written to: name another folder with --output or --show_dir")
    return list(zip(inputs, results, strict=True))


def _place(path: Path) -> Path:
    """Where a file or link stands."""
    return path.parent.resolve() / path.name


def _beside_page(inner: Path) -> Path:
    """A folder in that of all results, renamed if the page needs its name."""
    first, *rest = inner.parts or ("",)
    return Path(f"{first}_2", *rest) if first.casefold() in PAGE else inner


def _taken(folder: Path) -> dict[str, str]:
    """The source of each result, and of its stages, on the page of a folder, by their names as in `result_names`."""
    taken = {}
    for entry in read_entries(folder):
        result = Path(entry["file"])
        files = [result, *(file for file in stage_files(result, entry["last"]) if (folder / file).exists())]
        taken |= {str(file).casefold(): entry["source"] for file in files}
    return taken


def result_names(inputs: dict[Path, Path], stage_num: int, taken: dict[str, str]) -> list[Path]:
    """Each input's result, below the folder of all results: its name, with _2, _3, ... where another source has it.

    The names of `stage_num` stages, and of results that become a PNG (`write_result`), are kept free as well. Images
    whose format stays come first. `taken` are the sources of earlier results by their names.
    """
    results, taken = dict[Path, Path](), {**taken}
    for path in sorted(inputs, key=lambda path: result_suffix(path) != path.suffix):
        folder, suffix, source = inputs[path], result_suffix(path), readable(_place(path))
        stem = path.stem if path.suffix.lower() in SUFFIXES else path.name
        for count in itertools.count(1):
            result = folder / f"{stem if count == 1 else f'{stem}_{count}'}{suffix}"
            files = [result, *stage_files(result, stage_num)]
            # On some file systems A.png and a.png are one file.
            names = [readable(f"{file}{more}").casefold() for file in files for more in ("", ".png")]
            if all(taken.get(name, source) == source for name in names):
                break
        taken |= dict.fromkeys(names, source)
        results[path] = result
    return [results[path] for path in inputs]


def stage_files(result: Path, stage_num: int) -> list[Path]:
    """The files of a result's stages, beside it."""
    return [result.with_name(f"{result.stem}_stage{t}{result.suffix}") for t in range(1, stage_num + 1)]


def result_suffix(path: Path) -> str:
    """The input's suffix, or its content's if it has none of an image; .png where that format isn't written."""
    suffix = path.suffix
    if suffix.lower() not in SUFFIXES and path.is_file():
        suffix = kind_of(path)
    return suffix if suffix.lower() in WRITABLE else ".png"


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
    group = parser.add_argument_group("Model")
    group.add_argument("-p", "--preset", help="open the run of this preset's name")
    text = "a run (its best state), RUN/latest, RUN/step_N, pretrained weights by name, a file; default: photographs"
    group.add_argument("-m", "--model", help=text)
    group.add_argument("--stages", type=int, metavar="K", help="stop after stage K: faster, but worse")
    group = parser.add_argument_group("Input")
    group.add_argument("-i", "--input", nargs="+", action="extend", metavar="PATH", help="images, folders of images")
    group.add_argument("--recursive", action="store_true", help="include subfolders")
    group = parser.add_argument_group("Output")
    text = "folder for the results (default: SHOW_DIR/RUN) or, for one image, a file whose suffix is the format"
    group.add_argument("-o", "--output", metavar="PATH", help=text)
    group.add_argument("--all-stages", action="store_true", help="write every stage, as NAME_stage1 and so on")
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
    folder, written = Path(settings.show_dir) / (overrides.get("run") or opened.name), stage_num * known.all_stages
    output = known.output and to_path(known.output)
    search = known.input, settings, known.recursive, [output or folder, folder.parent]
    tasks = ranks.from_first(lambda: place_results(find_inputs(*search), output, folder, written))  # others may write
    name = f"{checkpoint.parent.name}/{checkpoint.name}"
    device, gallery = pick_device(settings.device), ranks.from_first(lambda: Gallery(folder, name, step))
    log.info(f"{stage_num} of {network.output_num} stages, {len(tasks)} images, {device}")

    results: list[Restored | None] = []  # None where an image was skipped
    with gallery, replaying(network, device):
        for path, result in Progress(ranks.share(tasks), unit="image"):
            try:
                item = derain(network, path, known.input is None, device, Restoring.of(settings), stage_num)
                result = write_result(item, result, written, result == output)
            except UserError as error:
                if isinstance(error, NotWritable) and not isinstance(error, BadName):
                    raise  # on a full disk, the next image would fail as well
                log.warning(f"skipped: {printable(error)}")
                results.append(None)
                continue
            add_to_page(gallery, item, result, needed=output is None)
            results.append(item)
    items = [item for item in ranks.gather(results) if item is not None]
    if not ranks.is_first():
        return 0
    if not items:
        log.warning("no image was restored; the page was left as it was")
        return 1
    log_groups("not in the results", [(what, item.source) for item in items for what in item.lost])
    if close := sum(item.change < NEARLY_INPUT for item in items):
        log.warning(f"warning: {close} of {len(items)} results are nearly their input: no rain, or little training")
    log.info(f"{summarize(items)}\nresults: {output or folder}" + f"\npage: {gallery.page}" * (not gallery.broken))
    return int(len(items) < len(tasks))


def add_to_page(gallery: Gallery, item: Restored, result: Path, needed: bool) -> None:
    """Add a result to the page, and free its images.

    A page that isn't `needed` is given up, with a warning, if it can't be written.
    """
    facts = (item.ground_truth, item.scores, item.change, item.seconds, item.metadata)
    try:
        if not gallery.broken:
            gallery.add(item.source, result, [item.image, *item.stages], *facts)
    except NotWritable as error:
        if needed:
            raise
        log.warning(f"no page: {printable(error)}")
        gallery.broken = True
    item.image, item.stages, item.ground_truth, item.metadata = np.empty(0), [], None, {}


def write_result(item: Restored, result: Path, stage_num: int, fixed: bool) -> Path:
    """Write `stage_num` of an image's stages and then, as it stands for all, its result; returns the result's file.

    Where that can't hold the image's depth or alpha, these are lost if its name is `fixed`; else .png is added to it.
    """
    images, suffix = [*item.stages[:stage_num], item.stages[-1]], result.suffix.lower()
    too_deep = item.image.dtype == np.uint16 and suffix not in ANY_DEPTH
    no_alpha = item.image.shape[2:] == (4,) and suffix in JPEG
    if fixed:
        images = [to_8bit(image) for image in images] if too_deep else images
        images = [image[..., :3] for image in images] if no_alpha else images
        item.lost += ["16 bits"] * too_deep + ["alpha"] * no_alpha
    elif too_deep or no_alpha:
        result = result.with_name(f"{result.name}.png")
    item.lost += [NAMES[key] for key in item.metadata.keys() - held(item.metadata, result.suffix.lower(), images[0])]
    for file, image in zip([*stage_files(result, stage_num), result], images, strict=True):
        write_image(file, image, item.metadata)
    if not in_terminal():
        log.info(f"{printable(item.source.name)}: {item.image.shape[1]}x{item.image.shape[0]}, {summarize([item])}")
    return result


if __name__ == "__main__":
    run_script(main)

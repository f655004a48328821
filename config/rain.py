"""Synthetic rain on clean images, in styles fitted to the data sets of the paper.

    python config/rain.py draw CLEAN DATA --count 5        # makes DATA/train, val and test
    python config/rain.py draw CLEAN DATA/train            # makes one folder of joined pairs
    python config/rain.py compare PAIRS --style rain100h   # compares it with real pairs

Exit status: 0 all done; 1 some images left out and named; 2 nothing done.
"""

import base.openmp  # noqa: F401

import argparse
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np

from base import images
from base.console import Parser, Progress, log, run_script, set_up_log
from base.errors import BadArgument, BadName, DamagedFile, Mismatch, MissingFile, Occupied, OutOfMemory, UserError
from base.files import write_bytes
from datasets.layouts import SPLITS, left_out
from datasets.pairing import Pair, choose_validation, log_next_step, show_pairs, write_pair
from synthesis.measure import comparison
from synthesis.streaks import add_rain, picture_generator
from synthesis.styles import STYLES, IntensityRain


def draw(options: argparse.Namespace) -> tuple[Counter[Path], int]:
    """Write joined pairs, B left and O right, unless they exist; returns how many by folder, and how many failed."""
    style, paths = STYLES[options.style], images.list_pairs(options.source)
    check_kind(paths, options.pairs)
    stem, times = Counter(path.stem for path in paths).most_common(1)[0]
    if times > 1:
        raise BadArgument(f"{times} images are called {stem}: rename them, their pairs would share a name")
    folders = choose_folders(paths, options)
    for line in left_out(images.survey(options.source)[1]):
        log.info(f"left out: {line}")
    drawn, chosen, failed = Counter(), defaultdict(list), []
    for path in Progress(paths, unit="image"):
        try:
            clean, folder = read_clean(path, options), folders[path]
            for number in range(options.count):
                name = f"{path.stem}_x{number + 1}.png"
                rainy = add_rain(clean, style, picture_generator(options.seed, path.stem, number))
                write_pair(folder / name, clean, rainy)
                drawn[folder] += 1
                if isinstance(style, IntensityRain):
                    angle, radius = style.choose(picture_generator(options.seed, path.stem, number))
                    chosen[folder].append(f"{name},{angle:g},{radius:g}\n")
        except (MissingFile, DamagedFile, Mismatch, OutOfMemory, BadName) as error:
            failed.append(str(error))
            log.warning(f"left out: {error}")
    if not drawn:
        raise MissingFile(f"no image can be used; the first: {failed[0]}")
    for folder, count in drawn.items():
        if chosen:
            table = "".join(["image,degrees,radius\n", *chosen[folder]])
            write_bytes(folder / "drawn.csv", table.encode("utf-8", "surrogateescape"))
        amount = f"{options.count} on each of {count // options.count} images"
        write_bytes(folder / "drawn.txt", f"synthetic rain: {options.style}, {amount}, seed {options.seed}\n".encode())
    return drawn, len(failed)


def check_kind(paths: list[Path], joined: bool) -> None:
    """Raise Mismatch where the images are not joined pairs, or are but should not be."""
    if show_pairs(paths, otherwise=joined) != joined:
        kind = "single images, not joined pairs" if joined else "joined pairs: add --pairs to take their clean halves"
        raise Mismatch(f"most images in {paths[0].parent} look like {kind}")


def read_clean(path: Path, options: argparse.Namespace) -> np.ndarray:
    return images.read_pair(path)[0] if options.pairs else images.to_bgr8(images.read_image(path))


def choose_folders(paths: list[Path], options: argparse.Namespace) -> dict[Path, Path]:
    """The folder for the pairs of each clean image. Raises UserError where these or others are in the way."""
    target = options.target
    places = [target] if target.name in SPLITS else [target / split for split in SPLITS]
    if {place.resolve() for place in (target, *places)} & {options.source.resolve(), paths[0].parent.resolve()}:
        raise Occupied(f"{target} holds the clean images: choose another folder for the pairs")
    if target.exists() and not target.is_dir():
        raise Occupied(f"{target} is a file: choose another folder for the pairs")
    if target.name in SPLITS and (options.val, options.test) != (None, None):
        raise BadArgument(f"--val and --test divide a data set, but {target} is one split: leave them out")
    folders = dict.fromkeys(paths, target) if target.name in SPLITS else divide(paths, options)
    planned = {f"{folder / path.stem}_x{k + 1}.png" for path, folder in folders.items() for k in range(options.count)}
    for path in (path for place in places for path in images.list_images(place)):
        if str(path) not in planned:
            raise Occupied(f"{path} does not come from these images and options: choose another folder for the pairs")
    return folders


def divide(paths: list[Path], options: argparse.Namespace) -> dict[Path, Path]:
    """The split's folder for each clean image, so that a photograph is in one split. Raises BadArgument."""
    target, counts = options.target, (options.val, options.test)
    val, test = (-(-len(paths) // 10) if count is None else count for count in counts)
    if val + test >= len(paths):
        least = f"--val {val} and --test {test} leave none of {len(paths)} images for training"
        raise BadArgument(f"{least}: lower them, or draw to {target / 'train'} alone")
    thumbs, group = {}, {}
    for path in Progress(paths, unit="image"):
        with suppress(UserError):  # reported when rain is drawn on it
            thumbs[str(path)] = images.thumbnail(read_clean(path, options))
    same = images.shared_backgrounds(thumbs, thumbs)
    for path in map(str, paths):  # the first image that shows the same photograph stands for all
        first = same.get(path, [path])[0]
        group[path] = group.get(first, path)
    pairs = [Pair(path, Path(group[str(path)]), (), path.stem) for path in paths]
    folders = {}
    for split, count in (("test", test), ("val", val), ("train", len(paths))):
        rest = [pair for pair in pairs if pair.rainy not in folders]
        names = choose_validation(rest, count, seed=0) if split != "train" else {pair.name for pair in rest}
        folders |= {pair.rainy: target / split for pair in rest if pair.name in names}
        if count and not names:
            raise BadArgument(f"no photograph is left for {split}, as images that show the same stay together")
    return folders


def main(arguments: list[str]) -> int:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    text = "Make a data set of joined pairs (B left, O right) by synthetic rain on clean images."
    drawing = commands.add_parser("draw", help="make a data set of joined pairs", description=text)
    text = "a clean image or a folder of them (subfolders are not read)"
    drawing.add_argument("source", type=Path, metavar="CLEAN", help=text)
    text = "the folder to make train, val and test in; or one called train, val or test, for all pairs"
    drawing.add_argument("target", type=Path, metavar="DATA", help=text)
    drawing.add_argument("--pairs", action="store_true", help="CLEAN holds joined pairs: take their clean halves")
    drawing.add_argument("--val", type=int, help="number of clean images for validation (default: a tenth)")
    drawing.add_argument("--test", type=int, help="number of clean images for the test (default: a tenth)")
    comparing = commands.add_parser("compare", help="print figures of real pairs and of synthetic rain on their B")
    comparing.add_argument("source", type=Path, metavar="PAIRS", help="a joined pair or a folder of joined pairs")
    for command in (drawing, comparing):
        command.add_argument("--style", choices=STYLES, metavar="STYLE", default="rain100h", help=", ".join(STYLES))
        command.add_argument("--count", type=int, default=1, help="renderings per image; default: %(default)s")
        command.add_argument("--seed", type=int, default=0, help="seed of the rain; default: %(default)s")
    options = parser.parse_args(arguments)
    held_out = [count for name in ("val", "test") if (count := getattr(options, name, None)) is not None]
    if options.count < 1 or min([options.seed, *held_out]) < 0:
        raise BadArgument("--count must be at least 1, --seed, --val and --test at least 0")
    set_up_log()
    if options.command == "draw":
        drawn, failed = draw(options)
        for folder, count in drawn.items():
            log.info(f"{count} pairs with {options.style} rain are in {folder}")
        log_next_step(options.target.parent if options.target.name in SPLITS else options.target)
        return int(failed > 0)
    paths = images.list_pairs(options.source)
    check_kind(paths, joined=True)
    log.info(comparison(paths, options.style, options.count, options.seed))
    return 0


if __name__ == "__main__":
    run_script(main)

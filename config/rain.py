"""Synthetic rain on clean images, in styles fitted to the data sets of the paper.

python config/rain.py draw CLEAN PAIRS --count 5            # writes joined pairs for training
python config/rain.py compare PAIRS --style rain100h        # compares synthetic rain with real pairs
"""

import base.openmp  # noqa: F401

import argparse
from collections import Counter
from pathlib import Path

import numpy as np

from base.console import Parser, log, run_script, set_up_log
from base.errors import BadArgument, Occupied
from base.files import write_bytes
from base.images import list_pairs, read_image, read_pair, to_bgr8, write_image
from synthesis.measure import comparison
from synthesis.streaks import add_rain, picture_generator
from synthesis.styles import STYLES, IntensityRain


def draw(options: argparse.Namespace) -> int:
    """Write joined pairs, B left and O right; returns how many. A second call writes the same files."""
    style, target, chosen, paths = STYLES[options.style], options.target, [], list_pairs(options.source)
    if target.resolve() in (path.resolve() for path in (options.source, paths[0].parent)):
        raise Occupied(f"{target} holds the clean images: choose another folder for the pairs")
    stem, times = Counter(path.stem for path in paths).most_common(1)[0]
    if times > 1:
        raise BadArgument(f"{times} images are called {stem}: rename them, their pairs would share a name")
    for path in paths:
        clean = read_pair(path)[0] if options.pairs else to_bgr8(read_image(path))
        for number in range(options.count):
            name = f"{path.stem}_x{number + 1}.png"
            rainy = add_rain(clean, style, picture_generator(options.seed, path.stem, number))
            write_image(target / name, np.hstack([clean, rainy]))
            if isinstance(style, IntensityRain):
                angle, radius = style.choose(picture_generator(options.seed, path.stem, number))
                chosen.append(f"{name},{angle:g},{radius:g}\n")
    if chosen:
        write_bytes(target / "drawn.csv", "".join(["image,degrees,radius\n", *chosen]).encode())
    note = f"synthetic rain: {options.style}, {options.count} on each of {len(paths)} images, seed {options.seed}\n"
    write_bytes(target / "drawn.txt", note.encode())
    return len(paths) * options.count


def main(arguments: list[str]) -> None:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw", help="write joined pairs (B left, O right) of clean images")
    drawing.add_argument("source", type=Path, metavar="CLEAN", help="a clean image or a folder of clean images")
    drawing.add_argument("target", type=Path, metavar="PAIRS", help="the folder to write name_x1.png, .. to")
    drawing.add_argument("--pairs", action="store_true", help="CLEAN holds joined pairs: take their clean halves")
    comparing = commands.add_parser("compare", help="print figures of real pairs and of synthetic rain on their B")
    comparing.add_argument("source", type=Path, metavar="PAIRS", help="a joined pair or a folder of joined pairs")
    for command in (drawing, comparing):
        command.add_argument("--style", choices=STYLES, metavar="STYLE", default="rain100h", help=", ".join(STYLES))
        command.add_argument("--count", type=int, default=1, help="renderings per image; default: %(default)s")
        command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.count < 1 or options.seed < 0:
        raise BadArgument("--count must be at least 1 and --seed at least 0")
    set_up_log()
    if options.command == "draw":
        log.info(f"{draw(options)} pairs with {options.style} rain are in {options.target}")
    else:
        log.info(comparison(list_pairs(options.source), options.style, options.count, options.seed))


if __name__ == "__main__":
    run_script(main)

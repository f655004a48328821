"""The numbers that bench.py and trainings.py measured, as a table of the targets, for the documents.

    python bench/report.py numbers.json

Both programs add to the file that their --json names.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Numbers = dict[str, Any]
MISSING = "-"


def add(path: Path | None, numbers: Numbers) -> None:
    """Add numbers to those in the file at `path`, if there is one to write."""
    if path:
        path.write_text(json.dumps({**read(path), **numbers}, indent=2))


def read(path: Path) -> Numbers:
    return json.loads(path.read_text()) if path.is_file() else {}


def _step(preset: str) -> Callable[[Numbers], str]:
    """A training step in each way that was measured."""

    def cell(numbers: Numbers) -> str:
        return ", ".join(f"{1000 * n['median']:.1f} ms {way}" for way, n in numbers["steps"][preset].items())

    return cell


def _speedup(numbers: Numbers) -> str:
    return f"{numbers['training']['speedup']:.2f} times"


def _whole_training(numbers: Numbers) -> str:
    return f"{numbers['paper']['whole'] / 60:.1f} min"


def _image(numbers: Numbers) -> str:
    return f"{1000 * numbers['inference']['product']['median']:.1f} ms"


def _each_of_several(numbers: Numbers) -> str:
    return f"{1000 * numbers['images']['product']['median'] / numbers['sizes']['images']:.1f} ms"


def _change_of_images(numbers: Numbers) -> str:
    return ", ".join(f"{worst['p999']:.2f} {precision}" for precision, worst in numbers["outputs"].items())


def _memory(numbers: Numbers) -> str:
    product, plain = (numbers["training"]["peaks"][side]["added"] / 2**20 for side in ("product", "reference"))
    return f"{product:.0f} MiB (reference {plain:.0f})"


def _waiting(numbers: Numbers) -> str:
    return f"{numbers['data']['rain drawn, rain100h']['waiting_share']:.1%} of a step"


def _curve(numbers: Numbers) -> str:
    return f"{numbers['curve']['end']:+.2f} dB at the end, {numbers['curve']['largest']:.2f} at most"


TARGETS: tuple[tuple[str, Callable[[Numbers], str], str], ...] = (
    ("S-DSEN, a training step", _step("sdsen"), "48 ms"),
    ("the same against the float32 reference", _speedup, "at least 7 times"),
    ("DSEN, a training step", _step("dsen"), "6 ms"),
    ("the paper's 20000 steps of S-DSEN, with validations and checkpoints", _whole_training, "17 min"),
    ("S-DSEN, one image", _image, "12 ms"),
    ("S-DSEN, several images at once, per image", _each_of_several, "8 ms"),
    ("images in 16 bits against float32, 99.9th percentile, of 255 levels", _change_of_images, "within 0.25"),
    ("S-DSEN, peak memory of a training step", _memory, ""),
    ("waiting for crops, synthetic rain", _waiting, "under 10 %"),
    ("PSNR of a training in bf16 against float32", _curve, "within 0.1 dB"),
)


def table(numbers: Numbers) -> str:
    """The targets and what was measured, in Markdown; a dash for what is missing."""
    rows = [(_title(numbers), "measured", "target"), ("---",) * 3]
    rows += [(what, _or_missing(cell, numbers), target) for what, cell, target in TARGETS]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _title(numbers: Numbers) -> str:
    machine, sizes = numbers.get("machine"), numbers.get("sizes")
    if not machine or not sizes:
        return "target"
    height, width = sizes["image"]
    crops = f"{sizes['batch']} crops of {sizes['patch']}x{sizes['patch']}"
    return f"{machine.get('gpu', machine['device'])}: {crops}, {width}x{height} images, {sizes['images']} at once"


def _or_missing(cell: Callable[[Numbers], str], numbers: Numbers) -> str:
    try:
        return cell(numbers) or MISSING
    except KeyError:
        return MISSING


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The targets and what was measured, as a table in Markdown.")
    parser.add_argument("numbers", type=Path, help="the file; one that is missing holds no numbers")
    print(table(read(parser.parse_args().numbers)))

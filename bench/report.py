"""The numbers that bench.py and trainings.py measured, as a table of targets for docs/SPEED.md.

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
    """A training step in each variant that was measured."""
    return lambda n: ", ".join(f"{1000 * v['median']:.1f} ms {name}" for name, v in n["steps"][preset].items())


def _memory(n: Numbers) -> str:
    here, plain = (n["training"]["peaks"][side]["added"] / 2**20 for side in ("this code", "reference"))
    return f"{here:.0f} MiB (reference {plain:.0f})"


def _images(n: Numbers) -> str:
    return f"{1000 * n['images']['this code']['median'] / n['sizes']['images']:.1f} ms"


def _outputs(n: Numbers) -> str:
    return ", ".join(f"{worst['p999']:.2f} {precision}" for precision, worst in n["outputs"].items())


# What, how it reads from the numbers, and the target.
TARGETS: tuple[tuple[str, Callable[[Numbers], str], str], ...] = (
    ("S-DSEN, a training step", _step("sdsen"), "48 ms"),
    ("the same against the float32 reference", lambda n: f"{n['training']['speedup']:.2f} times", "at least 7 times"),
    ("DSEN, a training step", _step("dsen"), "6 ms"),
    (
        "the paper's 20000 steps of S-DSEN, with validations and checkpoints",
        lambda n: f"{n['paper']['whole'] / 60:.1f} min",
        "17 min",
    ),
    ("S-DSEN, one image", lambda n: f"{1000 * n['inference']['this code']['median']:.1f} ms", "12 ms"),
    ("S-DSEN, several images at once, per image", _images, "8 ms"),
    ("images in 16 bits against float32, 99.9th percentile, of 255 levels", _outputs, "within 0.25"),
    ("S-DSEN, peak memory of a training step", _memory, ""),
    (
        "waiting for crops, synthetic rain",
        lambda n: f"{n['data']['synthetic rain']['waiting_share']:.1%} of a step",
        "under 10 %",
    ),
    (
        "PSNR of a training in bf16 against float32",
        lambda n: f"{n['curve']['end']:+.2f} dB at the end, {n['curve']['largest']:.2f} at most",
        "within 0.1 dB",
    ),
)


def table(numbers: Numbers) -> str:
    """The targets and what was measured, in Markdown; a dash for what is missing."""
    rows = [(_title(numbers), "measured", "target"), ("---",) * 3]
    for what, cell, target in TARGETS:
        try:
            rows.append((what, cell(numbers) or MISSING, target))
        except KeyError:
            rows.append((what, MISSING, target))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _title(numbers: Numbers) -> str:
    machine, sizes = numbers.get("machine"), numbers.get("sizes")
    if not machine or not sizes:
        return "target"
    height, width = sizes["image"]
    crops = f"{sizes['batch']} crops of {sizes['patch']}x{sizes['patch']}"
    return f"{machine['device']}: {crops}, {width}x{height} images, {sizes['images']} at once"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The targets and what was measured, in Markdown.")
    parser.add_argument("numbers", type=Path, help="file of --json; without it, nothing was measured")
    print(table(read(parser.parse_args().numbers)))

"""The built-in set: rain drawn on photographs that scikit-image carries, to try everything without a download."""

import importlib.util
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from base.console import log
from base.errors import UserError
from base.images import read_image, to_bgr8, write_image
from rain import STYLES, add_rain

VERSION = "2"  # raise it when the pairs change, so that sets built before are built anew
MARKER = "builtin_version.txt"
LONGEST_SIDE = 400  # pixels, about as large as the BSD photographs beneath the paper's data sets

# By photograph: none is in two splits. All lie in scikit-image's wheel, from 0.24 to 0.26 at least.
SPLIT = {
    "train": (
        "rocket.jpg",
        "motorcycle_left.png",
        "ihc.png",
        "camera.png",
        "coins.png",
        "brick.png",
        "grass.png",
        "gravel.png",
    ),
    "val": ("coffee.png",),
    "test": ("astronaut.png", "chelsea.png"),
}
# Light rain throughout: a network that learns for a minute should show what it has learnt.
# As dense at the borders as everywhere, which Rain100H's isn't: so the pairs stay those that scores were published of.
EVEN = tuple(replace(streaks, missing=()) for streaks in STYLES["rain100h"].streaks)
MIXTURE = (
    replace(STYLES["rain100h"], strength=(0.25, 0.5), streaks=EVEN),
    STYLES["rain100l"],
    STYLES["rain800"],
)
RENDERINGS = {"train": 6, "val": 3, "test": 3}  # of each photograph, the styles of MIXTURE in turn


def list_split() -> dict[str, list[str]]:
    """The file names of the pairs by split; "rocket_x2.png" is the second rendering on the photograph rocket."""
    return {
        split: [f"{Path(name).stem}_x{n + 1}.png" for name in names for n in range(RENDERINGS[split])]
        for split, names in SPLIT.items()
    }


def make_builtin(folder: Path) -> None:
    """Make `folder` with train, val and test: joined PNG pairs, B left and O right; the same ones on every machine.

    Returns at once where the set is there. It is built under another name and renamed, so `folder` is never half made.
    Raises UserError where scikit-image lacks a photograph, where `folder` holds something else, or on a full disk.
    """
    folder = Path(folder)
    if _is_finished(folder):
        return
    if folder.exists() and not (folder / MARKER).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists, but isn't the built-in set: move it away or give another folder")
    started = time.perf_counter()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _draw_pairs(temporary)
        (temporary / MARKER).write_text(VERSION)
        if not _is_finished(folder):  # another process may have been faster
            if folder.exists():  # an older version: moved away whole, as deleting it in place could be interrupted
                os.replace(folder, temporary.with_suffix(".old"))
            os.replace(temporary, folder)
            log.info("made the built-in set in %s (%.1f s)", folder, time.perf_counter() - started)
    except OSError as error:
        if not _is_finished(folder):
            raise UserError(f"{folder} can't be made: {error.strerror}") from None
    finally:
        for left_over in (temporary, temporary.with_suffix(".old")):
            shutil.rmtree(left_over, ignore_errors=True)


def _is_finished(folder: Path) -> bool:
    try:
        return (folder / MARKER).read_text().strip() == VERSION
    except OSError:
        return False


def _draw_pairs(folder: Path) -> None:
    photographs = _photograph_folder()
    for number, (split, name) in enumerate((split, name) for split, names in SPLIT.items() for name in names):
        if not (photographs / name).is_file():
            raise UserError(f"{photographs / name} is missing: install scikit-image again")
        clean = _shrink(to_bgr8(read_image(photographs / name)))
        for rendering in range(RENDERINGS[split]):
            rng = np.random.default_rng([number, rendering])
            rainy = add_rain(clean, MIXTURE[rendering % len(MIXTURE)], rng)
            path = folder / split / f"{Path(name).stem}_x{rendering + 1}.png"
            write_image(path, np.hstack([clean, rainy]))


def _photograph_folder() -> Path:
    # Not by `skimage.data`, which takes a second to load and would fetch a missing file from the network.
    package = importlib.util.find_spec("skimage")
    if package is None:
        raise UserError("scikit-image is missing, whose photographs the built-in set needs: pip install scikit-image")
    return Path(package.submodule_search_locations[0]) / "data"


def _shrink(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    factor = LONGEST_SIDE / max(height, width)
    if factor >= 1:
        return image
    return cv2.resize(image, (round(width * factor), round(height * factor)), interpolation=cv2.INTER_AREA)

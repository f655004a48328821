"""The built-in set: synthetic rain on photographs that come with scikit-image, to try everything without a download."""

import importlib.util
import os
import shutil
from pathlib import Path

import cv2
import numpy as np

from base.errors import MissingFile, NotWritable, Occupied
from base.images import read_image, to_bgr8, write_image
from synthesis.streaks import add_rain
from synthesis.styles import STYLES, RainStyle, Streaks

VERSION = "2"  # of the pairs; a set of another version is built again
MARKER = "builtin_version.txt"
LONGEST_SIDE = 400  # pixels, about the size of the BSD photographs in the paper's data sets

# By photograph: none is in two splits. All are in scikit-image's wheel, at least from 0.24 to 0.26.
SPLIT = {
    "train": "rocket.jpg motorcycle_left.png ihc.png camera.png coins.png brick.png grass.png gravel.png".split(),
    "val": ["coffee.png"],
    "test": ["astronaut.png", "chelsea.png"],
}
# Light rain, so that a network shows within a minute what it learns. Published scores belong to these ranges.
HEAVY = RainStyle(
    angle=13,
    strength=(0.25, 0.5),
    streaks=(
        Streaks(True, (1, 2), (0, 10), (90, 170), (0.9, 2.2), (0.2, 0.6), (45, 85)),
        Streaks(False, (1, 3), (0, 13), (90, 200), (1.2, 2.8), (0.24, 0.45), (50, 95), (0.9, 2.8), 0.12),
        Streaks(True, (0, 2), (20, 45), (25, 60), (1.0, 1.6), (0.02, 0.1), (10, 30)),
    ),
)
MIXTURE = (HEAVY, STYLES["rain100l"], STYLES["rain800"])
RENDERINGS = {"train": 6, "val": 3, "test": 3}  # per photograph, in the styles of MIXTURE in turn


def make_builtin(folder: Path) -> None:
    """Make `folder` with train, val and test, if it does not exist: built under another name, then renamed.

    Raises MissingFile without scikit-image, Occupied where `folder` holds something else, NotWritable on a full disk.
    """
    if _is_finished(folder):
        return
    if folder.exists() and not (folder / MARKER).exists():
        raise Occupied(f"{folder} is not the built-in set: move it away or give another folder")
    temporary, replaced = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        _write_pairs(temporary)
        (temporary / MARKER).write_text(VERSION)
        if not _is_finished(folder):  # another process may have been faster
            if folder.exists():  # a set of another version, which is never half there
                os.replace(folder, replaced)
            os.replace(temporary, folder)
    except OSError as error:
        if not _is_finished(folder):
            raise NotWritable(f"{folder} cannot be written: {error.strerror}") from None
    finally:
        for path in (temporary, replaced):
            shutil.rmtree(path, ignore_errors=True)


def _is_finished(folder: Path) -> bool:
    marker = folder / MARKER
    return marker.is_file() and marker.read_text() == VERSION


def _write_pairs(folder: Path) -> None:
    package = importlib.util.find_spec("skimage")  # `skimage.data` takes a second to import and downloads missing files
    if package is None:
        raise MissingFile("the built-in set needs the photographs of scikit-image: pip install scikit-image")
    photographs = Path(package.submodule_search_locations[0]) / "data"
    for number, (split, name) in enumerate((split, name) for split, names in SPLIT.items() for name in names):
        clean = to_bgr8(read_image(photographs / name))
        factor = min(1.0, LONGEST_SIDE / max(clean.shape[:2]))
        size = [round(side * factor) for side in clean.shape[1::-1]]
        clean = cv2.resize(clean, size, interpolation=cv2.INTER_AREA)
        for rendering in range(RENDERINGS[split]):
            rng = np.random.default_rng([number, rendering])
            rainy = add_rain(clean, MIXTURE[rendering % len(MIXTURE)], rng)
            write_image(folder / split / f"{Path(name).stem}_x{rendering + 1}.png", np.hstack([clean, rainy]))

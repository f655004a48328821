"""The page of show.py: for each image input against result, every stage, the rain layer and the scores.

`showdir/index.html` is gallery.html with its facts as JSON; it loads nothing from the network. Its previews are in
`showdir/page/N`, with a new N for each call: until the new page is written, the old one keeps its previews.
"""

import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
import numpy as np

from base.errors import NotWritable, Occupied
from base.files import write_bytes
from base.images import to_bgr8, write_image

TEMPLATE = Path(__file__).with_name("gallery.html")
MARK = b'<meta name="generator" content="S-DSEN show.py">'  # an index.html without it is not replaced
LARGEST = 1600  # side of a preview, pixels


@dataclass
class Restored:
    """One image before and after, in cv2's order."""

    image: np.ndarray  # (H, W), (H, W, 3) or (H, W, 4), uint8 or uint16
    stages: list[np.ndarray]  # the restored image after each stage, of the shape and type of `image`
    ground_truth: np.ndarray | None  # (H, W, 3) uint8, if there is one
    scores: list[dict[str, float]]  # of the input, then after each stage; empty without ground truth
    change: float  # mean absolute difference of input and last stage, of 255 levels
    seconds: float  # of the network


def rain_layer(O: np.ndarray, restored: np.ndarray) -> tuple[np.ndarray, int]:
    """The rain layer O - restored of two (H, W, 3) uint8 images, made visible: (H, W, 3) uint8 and its gain.

    The gain is the largest of 1, 2, 4, 8 and 16 that clips at most 1 % of the samples. Where the network made the image
    brighter, the layer is negative, and shown black.
    """
    rain = cv2.subtract(O, restored)  # clips at 0
    peak = max(1.0, float(np.percentile(rain, 99)))
    gain = max(g for g in (1, 2, 4, 8, 16) if g == 1 or g * peak <= 255)
    return cv2.convertScaleAbs(rain, alpha=gain), gain


class Gallery:
    """The previews of images, one after another, and at the end the page."""

    def __init__(self, show_dir: Path):
        """Make the previews' folder. Raises Occupied where there is an index.html that show.py did not write."""
        self.show_dir, self.page = show_dir, show_dir / "index.html"
        if self.page.exists() and MARK not in self.page.read_bytes():
            raise Occupied(f"{self.page} was not written by show.py and is kept: name another folder with --show_dir")
        folder = show_dir / "page"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.former = [path for path in folder.iterdir() if path.name.isdecimal()]
            self.folder = folder / str(1 + max((int(path.name) for path in self.former), default=0))
            self.folder.mkdir()
        except OSError as error:
            raise NotWritable(f"{show_dir} can't be written: {error.strerror}") from None

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

    def write(self, images: Sequence[dict], checkpoint: str, step: int, stage_num: int, summary: str) -> Path:
        """Write the page of these entries, remove the previews of the last page, and return the page's path."""
        facts = {"checkpoint": checkpoint, "step": step, "stages": stage_num, "summary": summary, "images": images}
        # "<" is escaped, so that no file name can end the script that holds the JSON.
        text = json.dumps(facts, allow_nan=False).replace("<", "\\u003c")
        write_bytes(self.page, TEMPLATE.read_text(encoding="utf-8").replace("{{facts}}", text).encode())
        for folder in self.former:
            shutil.rmtree(folder, ignore_errors=True)
        return self.page

    def discard(self) -> None:
        """Remove this call's previews; the last page stays."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _preview(self, name: str, picture: np.ndarray) -> str:
        scale = min(1.0, LARGEST / max(picture.shape[:2]))
        height, width = (max(1, round(scale * side)) for side in picture.shape[:2])
        path = self.folder / f"{name}.jpg"
        write_image(path, cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA))
        return path.relative_to(self.show_dir).as_posix()


def _finite(score: float) -> float | None:
    """A score for JSON, which has neither nan nor inf: null, and 999 dB for equal images."""
    return None if math.isnan(score) else min(round(score, 4), 999.0)

"""The page of show.py: for each image input against result, every stage, the rain layer and the scores.

`showdir/index.html` is gallery.html with its facts as JSON; it loads nothing from the network. Its previews are in
`showdir/page/N`, with a new N for each call: until the new page is written, the old one keeps its previews.
"""

import json
import math
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
from base.images import to_bgr8

TEMPLATE = Path(__file__).with_name("gallery.html")
MARK = b'<meta name="generator" content="S-DSEN show.py">'  # an index.html without it is not replaced
LARGEST, THUMBNAIL = 1600, 160  # sides of previews, pixels
SMALL = 128 * 128  # pixels; a preview up to this size is a PNG, a larger one a JPEG


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
        try:
            (show_dir / "page").mkdir(parents=True, exist_ok=True)
            self.number = 1 + max(self._numbers(), default=0)
            self.folder = show_dir / "page" / str(self.number)
            self.folder.mkdir()
        except OSError as error:
            raise NotWritable(f"{show_dir} can't be written: {error.strerror}") from None

    def entry(self, number: int, item: Restored, source: Path, result: str) -> dict[str, Any]:
        """Write the previews of image `number` and return its part of the page.

        `source` is the file it was read from, `result` the file it was written to, relative to show_dir.
        """
        O, stages = to_bgr8(item.image), [to_bgr8(stage) for stage in item.stages]
        layer, gain = rain_layer(O, stages[-1])
        pictures = {"Input": O, **{f"Stage {t}": stage for t, stage in enumerate(stages, 1)}}
        pictures["Rain layer"] = layer
        if item.ground_truth is not None:
            pictures["Ground truth"] = item.ground_truth
        scores = [[_finite(row["psnr"]), _finite(row["ssim"])] for row in item.scores]
        views = []
        for index, (label, picture) in enumerate(pictures.items()):
            view: dict[str, Any] = {"label": label, "url": self._preview(f"{number}_{index}", picture, LARGEST)}
            if index < len(scores):  # the input and the stages come first
                view["scores"] = scores[index]
            views.append(view)
        strip = np.hstack([_fit(picture, THUMBNAIL, square=True) for picture in pictures.values()])
        return {
            "name": _readable(source.name),
            "source": _readable(str(source)),
            "result": quote(result.encode(errors="surrogateescape")),
            "width": O.shape[1],
            "height": O.shape[0],
            "change": round(item.change, 3),
            "gain": gain,
            "last": len(stages),  # index of the result in `views`
            "views": views,
            "strip": self._preview(f"{number}_strip", strip, strip.shape[1]),
        }

    def write(self, images: Sequence[dict], checkpoint: str, step: int, stage_num: int, summary: str) -> Path:
        """Write the page of these entries, remove the previews of the last page, and return the page's path."""
        facts = {"checkpoint": checkpoint, "step": step, "stages": stage_num, "summary": summary, "images": images}
        # "<" is escaped, so that no file name can end the script that holds the JSON.
        text = json.dumps(facts, allow_nan=False).replace("<", "\\u003c")
        page = TEMPLATE.read_text(encoding="utf-8").replace("{{facts}}", text)
        write_bytes(self.page, page.encode())
        for number in self._numbers():
            if number < self.number:
                shutil.rmtree(self.show_dir / "page" / str(number), ignore_errors=True)
        return self.page

    def discard(self) -> None:
        """Remove this call's previews; the last page stays."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _numbers(self) -> list[int]:
        return [int(path.name) for path in (self.show_dir / "page").iterdir() if path.name.isdecimal()]

    def _preview(self, name: str, picture: np.ndarray, largest: int) -> str:
        picture = _fit(picture, largest)
        small = picture.shape[0] * picture.shape[1] <= SMALL
        suffix, options = (".png", []) if small else (".jpg", [cv2.IMWRITE_JPEG_QUALITY, 90])
        path = self.folder / f"{name}{suffix}"
        try:
            path.write_bytes(cv2.imencode(suffix, picture, options)[1].tobytes())
        except OSError as error:
            raise NotWritable(f"{path} can't be written: {error.strerror}") from None
        return path.relative_to(self.show_dir).as_posix()


def _fit(picture: np.ndarray, side: int, square: bool = False) -> np.ndarray:
    """A picture scaled down to fit `side`, or (`square`) its central square scaled to side x side."""
    height, width = picture.shape[:2]
    if square:
        cut = min(height, width)
        top, left = (height - cut) // 2, (width - cut) // 2
        return cv2.resize(picture[top : top + cut, left : left + cut], (side, side), interpolation=cv2.INTER_AREA)
    scale = side / max(height, width)
    if scale >= 1:
        return picture
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def _finite(score: float) -> float | None:
    """A score for JSON, which has neither nan nor inf: null, and 999 dB for equal images."""
    return None if math.isnan(score) else min(round(score, 4), 999.0)


def _readable(name: str) -> str:
    """A file name as text, even if its bytes are no UTF-8."""
    return name.encode(errors="surrogateescape").decode(errors="replace")

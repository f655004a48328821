"""A page for each folder of results, and a page that lists these pages.

    SHOW_DIR/index.html                  the list: list.html with the files that it names and its facts as JSON
    SHOW_DIR/NAME/index.html             the page of the results in SHOW_DIR/NAME: page.html likewise
    SHOW_DIR/NAME/page/KEY/entry.json    the facts of one image, beside its previews

A page shows all entries whose result still exists. So several calls and ranks add to one page, also at once, and one
that was stopped half-way has left its entries.
"""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote

import cv2
import numpy as np

from base import ranks
from base.console import log
from base.errors import Occupied
from base.files import write_bytes, write_json
from base.images import to_bgr8, write_image
from base.metadata import PROFILE

HERE = Path(__file__).parent
MARK = b'<meta name="generator" content="S-DSEN show.py">'  # an index.html without it is not replaced
THUMBNAIL, PREVIEW, FULL = 192, 1600, 8192  # largest sides, pixels; FULL is for the zoom of what is larger than PREVIEW
EVERY = 10  # seconds after which a long call writes the page again
KINDS = {  # of the facts in an entry
    **dict.fromkeys(("name", "source", "file", "key", "result", "checkpoint"), str),
    **dict.fromkeys(("step", "width", "height", "gain", "last"), int),
    **dict.fromkeys(("time", "change", "seconds"), (int, float)),
}


def rain_layer(O: np.ndarray, restored: np.ndarray) -> tuple[np.ndarray, int]:
    """The rain layer O - restored of two (H, W, 3) uint8 images, made visible: (H, W, 3) uint8 and its gain.

    The gain is the largest of 1, 2, 4, 8 and 16 that clips at most 1 % of the samples. Negative samples are black.
    """
    rain = cv2.subtract(O, restored)  # clips at 0
    peak = max(1.0, float(np.percentile(rain, 99)))
    gain = max(g for g in (1, 2, 4, 8, 16) if g == 1 or g * peak <= 255)
    return cv2.convertScaleAbs(rain, alpha=gain), gain


class Gallery:
    """The page of a folder. Within `with`, images are added to it; at the end, also after an error, it is written."""

    broken = False  # set it to leave the page as it is

    def __init__(self, folder: Path, checkpoint: str, step: int):
        """`checkpoint` is what the page says about the network. Raises Occupied if an index.html is somebody else's."""
        self.folder, self.page = folder, folder / "index.html"
        self.facts = {"checkpoint": checkpoint, "step": step, "time": round(time.time(), 3)}
        self.written = -math.inf
        for page in (self.page, folder.parent / "index.html"):
            if not _is_ours(page):
                raise Occupied(f"{page} was not written by show.py and is kept: name another folder with --show_dir")

    def __enter__(self) -> "Gallery":
        return self

    def __exit__(self, error: type | None, value: BaseException | None, where: TracebackType | None) -> None:
        try:
            if error is None:
                ranks.gather([])  # waits for the entries of the other ranks
        finally:
            if ranks.is_first() and not self.broken and self.write() and error is not None:
                log.info(f"page of the images that were finished: {self.page}")

    def add(
        self,
        source: Path,
        result: Path,
        images: Sequence[np.ndarray],
        ground_truth: np.ndarray | None = None,
        scores: Sequence[dict[str, float]] = (),
        change: float = 0.0,
        seconds: float = 0.0,
        metadata: dict[int, bytes] | None = None,
    ) -> None:
        """Write the entry of an image in place of an earlier one of the same result.

        `source` is the file it was read from, `result` the file it was restored to; `images` are the image and each
        stage, as of `read_image`, with their `scores`; `change` is the mean one, of 255 levels. Of the `metadata`,
        previews get the colour profile.
        """
        path = os.path.relpath(result, self.folder)
        place = self.folder / "page" / hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        names = {"name": source.name, "source": source.parent.resolve() / source.name, "file": path}
        if path.startswith("..") or not path.isprintable():  # a server of SHOW_DIR can't reach it: a copy is linked
            write_bytes(place / f"result{result.suffix}", result.read_bytes())
            path = os.path.relpath(place / f"result{result.suffix}", self.folder)
        pictures, gain = _pictures(images, ground_truth)
        last = len(images) - 1  # the view of the result
        zoomed = ("Input", f"Stage {last}", "Ground truth")
        profile = {key: value for key, value in (metadata or {}).items() if key == PROFILE}
        views = [_view(place / str(i), *item, item[0] in zoomed, profile) for i, item in enumerate(pictures.items())]
        for view, row in zip(views, scores, strict=False):  # the input and the stages come first
            view["scores"] = [round(row[name], 4) if math.isfinite(row[name]) else None for name in ("psnr", "ssim")]
        _write_preview(place / "thumbnail.jpg", pictures[f"Stage {last}"], THUMBNAIL, profile)
        height, width = images[0].shape[:2]
        entry = {name: readable(value) for name, value in names.items()} | {"key": place.name, "result": quote(path)}
        entry |= {"width": width, "height": height, "gain": gain, "last": last, "views": views}
        write_json(place / "entry.json", {**entry, "change": change, "seconds": seconds, **self.facts})
        written = [path, *(view[name] for view in views for name in ("url", "full") if name in view)]
        _clear(place, {"entry.json", "thumbnail.jpg", *(Path(file).name for file in written)})
        if ranks.is_first() and time.monotonic() - self.written > EVERY:
            self.write()

    def write(self) -> bool:
        """Write the page and the list of pages; returns False, and writes nothing, where the page has no entry."""
        entries = read_entries(self.folder)
        if entries:
            _fill("page.html", self.page, {"name": readable(self.folder.name), "images": entries, **_means(entries)})
            pages = [_describe(page.parent) for page in self.folder.parent.glob("*/index.html") if _is_ours(page)]
            _fill("list.html", self.folder.parent / "index.html", {"pages": [page for page in pages if page]})
        self.written = time.monotonic()
        return bool(entries)


def read_entries(folder: Path) -> list[dict[str, Any]]:
    """The entries in a folder of results, by key; without those whose result is gone, and without damaged ones."""
    entries = []
    for path in sorted((folder / "page").glob("*/entry.json")):
        with suppress(OSError, ValueError, LookupError, TypeError):
            entry = json.loads(path.read_bytes())
            _check(entry)
            if entry["key"] == path.parent.name and (folder / unquote(entry["result"])).exists():
                entries.append(entry)
    return entries


def _check(entry: dict[str, Any]) -> None:
    """Raise ValueError, LookupError or TypeError if an entry is damaged."""
    json.dumps(entry, allow_nan=False)
    _means([entry])
    views, texts = entry["views"], [view[name] for view in entry["views"] for name in ("label", "url")]
    scores = [score or 0.0 for view in views for score in view.get("scores", (0.0, 0.0))]
    right = all(isinstance(entry[name], kind) for name, kind in KINDS.items()) and 0 < entry["last"] < len(views)
    if not right or set(map(type, texts)) != {str} or set(map(type, scores)) != {float} or len(scores) != len(texts):
        raise ValueError("damaged")


def _clear(place: Path, kept: set[str]) -> None:
    """Remove the files of an earlier entry; hidden ones are just being written by another call."""
    for file in place.glob("[!.]*"):
        with suppress(OSError):
            if file.name not in kept:
                file.unlink()


def _describe(folder: Path) -> dict[str, Any]:
    """What list.html says about the page of a folder; nothing if it has no entries."""
    entries = read_entries(folder)
    if not entries:
        return {}
    newest = max(entries, key=lambda entry: entry["time"])
    facts = {name: newest[name] for name in ("checkpoint", "step", "time", "key")} | {"count": len(entries)}
    return {"name": readable(folder.name), "url": quote(os.fsencode(folder.name)), **facts, **_means(entries)}


def _means(entries: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The mean PSNR and SSIM, each of the inputs and of the results, over the entries that have them."""
    both = [[entry["views"][0], entry["views"][entry["last"]]] for entry in entries]
    means = {}
    for index, name in enumerate(("psnr", "ssim")):
        rows = [[view["scores"][index] for view in pair] for pair in both if "scores" in pair[0]]
        rows = [row for row in rows if None not in row]
        means |= {name: np.mean(rows, 0).round(4).tolist()} if rows else {}
    return means


def _pictures(images: Sequence[np.ndarray], ground_truth: np.ndarray | None) -> tuple[dict[str, np.ndarray], int]:
    """What can be compared, by its label, each (H, W, 3) uint8; and the gain of the rain layer."""
    O, *stages = (to_bgr8(image) for image in images)
    layer, gain = rain_layer(O, stages[-1])
    pictures = {"Input": O, **{f"Stage {t}": stage for t, stage in enumerate(stages, 1)}, "Rain layer": layer}
    return pictures if ground_truth is None else {**pictures, "Ground truth": ground_truth}, gain


def _view(path: Path, label: str, picture: np.ndarray, zoomed: bool, profile: dict[int, bytes]) -> dict[str, Any]:
    """Write a picture's previews; its part of the entry: their addresses, and the largest side of the larger one."""
    sides = {"url": PREVIEW} | ({"full": FULL} if zoomed and max(picture.shape) > PREVIEW else {})
    view: dict[str, Any] = {"label": label}
    for name, side in sides.items():
        file = path.with_name(f"{path.name}_{name}.jpg")
        view |= {name: f"page/{path.parent.name}/{file.name}", "side": _write_preview(file, picture, side, profile)}
    return view


def _write_preview(path: Path, picture: np.ndarray, largest: int, profile: dict[int, bytes]) -> int:
    """Write a picture whose sides are at most `largest` pixels; returns the larger one."""
    scale = min(1.0, largest / max(picture.shape[:2]))
    height, width = (max(1, round(scale * side)) for side in picture.shape[:2])
    write_image(path, cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA), profile)
    return max(height, width)


def _fill(template: str, page: Path, facts: dict[str, Any]) -> None:
    """Write a page: a template with the styles and scripts that it names, and its facts as JSON."""
    # "<" is escaped, so that no file name can end the script that holds the JSON.
    text = json.dumps(facts, allow_nan=False).replace("<", "\\u003c")
    html = re.sub(r"{{(\w+[.]\w+)}}", lambda found: _read(found[1]), _read(template))
    write_bytes(page, html.replace("{{facts}}", text).encode())


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8").rstrip()


def _is_ours(page: Path) -> bool:
    """Whether a page may be replaced: it is missing or was written here."""
    try:
        return MARK in page.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False


def readable(name: str | Path) -> str:
    """A name as text; its bytes may be no UTF-8."""
    return os.fsencode(name).decode(errors="replace")

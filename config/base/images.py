"""Reading and writing image files: 8 or 16 bits, grey, colour or with alpha, always in BGR order.

A pair is one file: the clean background `B` in the left half, the rainy image `O` in the right half.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from base.errors import DamagedFile, Mismatch, MissingFile, OutOfMemory
from base.files import write_bytes
from base.metadata import JPEG, TIFF, completed, held, jpeg_segments, losses, made_upright, unmultiplied

SAME_BACKGROUND = 0.995  # correlation of thumbnails; in Rain800 the same background reaches 0.999, others 0.991 at most
WRITABLE = {".png", ".bmp", ".webp", ".avif", *JPEG, *TIFF}  # without losing more than such a file must lose
SUFFIXES = {*WRITABLE, *".gif .jp2 .dib .ppm .pgm .pbm .pnm .pam .ras .sr .hdr .pic .exr .pfm".split()}
RAW = set(".dng .nef .nrw .arw .srf .sr2 .cr2 .cr3 .crw .orf .rw2 .pef .srw .raf .3fr .erf .kdc .mrw".split())
CONVERT = "which OpenCV can't read: convert it to JPEG or PNG"
KINDS = {  # by a file's first bytes: a suffix, or what it is instead of an image that OpenCV can read
    rb"\x89PNG\r\n": ".png",
    rb"\xff\xd8\xff": ".jpg",
    rb"RIFF....WEBP": ".webp",
    rb"II\*\0|MM\0\*": ".tif",
    rb"II\+\0|MM\0\+": "a BigTIFF image: convert it to TIFF",
    rb"BM.{12}[\x0c-\x7c]\0\0\0": ".bmp",
    rb"GIF8[79]a": ".gif",
    rb"....ftyp.{0,40}?avi[fs]": ".avif",
    rb"\0\0\0\x0cjP  ": ".jp2",
    rb"....ftyp.{0,40}?(hei|hev|mif1)": f"a HEIC image, {CONVERT}",
    rb"\xff\x0a|\0\0\0\x0cJXL ": f"a JPEG XL image, {CONVERT}",
    rb"8BPS": f"a Photoshop image, {CONVERT}",
    rb"%PDF": f"a PDF, {CONVERT}",
    rb"....ftyp|....moov|RIFF....AVI |\x1aE\xdf\xa3|FLV|\0\0\x01[\xb3\xba]|OggS|\x30\x26\xb2\x75": "a video",
    rb"\Z": "empty",
}
UNKNOWN = "no image"


def survey(folder: Path, recursive: bool = False, results: Iterable[Path] = ()) -> tuple[list[Path], dict[Path, str]]:
    """The image files of a folder in natural order ("2" before "10"), and why each other entry is left out.

    Hidden files are in neither. Both are empty if there is no such folder. Folders of `results` in it are left out.
    """
    images: list[Path] = []
    left_out: dict[Path, str] = {}
    closed = {path.resolve(): "a folder of results" for path in results}

    def visit(folder: Path) -> None:
        closed[folder.resolve()] = "a folder that is read already"  # links may lead back
        try:
            entries = sorted((path for path in folder.iterdir() if path.name[0] != "."), key=_natural)
        except OSError as error:
            left_out[folder] = str(error.strerror)
            return
        for path in entries:
            if recursive and path.is_dir():
                if reason := closed.get(path.resolve()):
                    left_out[path] = reason
                else:
                    visit(path)
            elif reason := _no_image(path):
                left_out[path] = reason
            else:
                images.append(path)

    if os.path.isdir(folder):  # unlike Path.is_dir, it takes names of any length
        visit(folder)
    return images, left_out


def _no_image(path: Path) -> str:
    """Why a file isn't read as an image, by its name and first bytes; empty if it is."""
    if not path.is_file():
        return "a folder" if path.is_dir() else "no file" if path.exists() else "a link to nothing"
    if path.suffix.lower() in RAW:
        return f"a raw file, {CONVERT}"
    if path.suffix.lower() in SUFFIXES or cv2.haveImageReader(_for_cv2(path)):
        return ""
    return kind_of(path)


def _for_cv2(path: Path) -> Any:
    """A file's name as bytes: OpenCV crashes on a str that is no UTF-8."""
    return os.fsencode(path)


def kind_of(path: Path) -> str:
    """What a file is by its first bytes: a suffix, as ".png", or else in words, as for `survey`."""
    try:
        with open(path, "rb") as file:
            return _kind(file.read(64))
    except OSError as error:
        return str(error.strerror)


def _kind(data: bytes) -> str:
    return next((kind for start, kind in KINDS.items() if re.match(start, data, re.DOTALL)), UNKNOWN)


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder in natural order; none if there is no such folder."""
    return survey(folder)[0]


def _natural(path: Path) -> list[int | str]:
    return [int(part) if index % 2 else part for index, part in enumerate(re.split("([0-9]+)", path.name.lower()))]


def list_pairs(source: Path) -> list[Path]:
    """The pairs, or clean images, in a folder; or `source` itself if it is a file. Raises MissingFile if none is."""
    paths = [source] if source.is_file() else list_images(source)
    if not source.exists():
        raise MissingFile(f"there is no file or folder {source}")
    if not paths:
        raise MissingFile(f"{source} contains no images: convert.py makes data sets, folders of joined pairs")
    return paths


class Picture(NamedTuple):
    """An upright image and what else is in its file."""

    image: np.ndarray  # as of `read_image`
    metadata: dict[int, bytes]  # the EXIF data and the colour profile of this image, by the keys of `base.metadata`
    lost: list[str]  # what neither of these holds, in a few words each


def read_image(path: Path) -> np.ndarray:
    """An upright image as (H, W) grey, (H, W, 3) or (H, W, 4), uint8 or uint16.

    Raises MissingFile, DamagedFile or OutOfMemory.
    """
    return _read(path)[1]


def read_picture(path: Path) -> Picture:
    """An image with its metadata. Raises what `read_image` raises."""
    data, image, metadata = _read(path)
    count = cv2.imcount(_for_cv2(path)) if path.is_file() else 1  # a pipe can't be read again
    frames = [f"{count - 1} of {count} frames or pages"] if count > 1 else []
    return Picture(image, held(metadata, ".png", image), [*frames, *losses(data, image, metadata)])


def _read(path: Path) -> tuple[bytes, np.ndarray, dict[int, bytes]]:
    """A file's bytes, its upright image and the metadata that its format can hold, fit for the upright image."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise MissingFile(f"can't read {path}: {error.strerror}") from None
    kind = _kind(data[:64])
    if Path(path).suffix.lower() in RAW:
        raise DamagedFile(f"{path} is a raw file, {CONVERT}")
    if kind[0] != "." and kind != UNKNOWN:
        raise DamagedFile(f"{path} is {kind}")
    if _is_cut_off(data, kind):
        raise DamagedFile(f"{path} is cut off: get it again")
    image, metadata = _decode(path, data)
    if image is None:
        known = kind[0] == "." or (Path(path).is_file() and cv2.haveImageReader(_for_cv2(path)))
        reason = "damaged, cut off or of a variety that OpenCV can't read" if known else kind
        raise DamagedFile(f"{path} is {reason}")
    if image.dtype not in (np.uint8, np.uint16):
        raise DamagedFile(f"{path} has samples of type {image.dtype}, not 8 or 16 bits per channel")
    return data, *made_upright(data, kind, image, metadata)


def _is_cut_off(data: bytes, kind: str) -> bool:
    """Whether the end of a PNG or JPEG is missing, of which the libraries print messages or make grey areas."""
    if kind == ".png":
        return b"IEND\xaeB`\x82" not in data
    return kind == ".jpg" and data.find(b"\xff\xd9", jpeg_segments(data)[1]) < 0


def _decode(path: Path, data: bytes) -> tuple[np.ndarray | None, dict[int, bytes]]:
    (cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging).setLogLevel(0)  # OpenCV 5 moved it
    buffer = np.frombuffer(unmultiplied(data), np.uint8)
    try:
        image, keys, values = cv2.imdecodeWithMetadata(buffer, flags=cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        if "CV_IO_MAX_IMAGE" in error.err:
            text = "more pixels than OpenCV reads, 2^30: make it smaller or set OPENCV_IO_MAX_IMAGE_PIXELS"
            raise OutOfMemory(f"{path} has {text}") from None
        if error.code == cv2.Error.StsNoMem:
            raise OutOfMemory(f"{path} is too large for the memory: make it smaller") from None
        return None, {}
    return image, {int(key): np.asarray(value).tobytes() for key, value in zip(keys, values, strict=True)}


def to_8bit(image: np.ndarray) -> np.ndarray:
    """An image of `read_image` as uint8: 16 bits are rounded."""
    return image if image.dtype == np.uint8 else ((image.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def to_bgr8(image: np.ndarray) -> np.ndarray:
    """An image of `read_image` as (H, W, 3) BGR uint8: without alpha, 16 bits rounded to 8."""
    image = to_8bit(image)
    if image.ndim == 2:
        return np.repeat(image[..., None], 3, axis=2)
    return np.ascontiguousarray(image[..., :3])


def read_pair(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The pair (B, O) of a file, each (H, W, 3) BGR uint8. Raises Mismatch, or what `read_image` raises."""
    image = to_bgr8(read_image(path))
    half, odd = divmod(image.shape[1], 2)
    if odd:
        raise Mismatch(f"{path} is not a joined pair: its width {image.shape[1]} is odd; convert.py makes pairs")
    return image[:, :half], image[:, half:]


def write_image(path: Path, image: np.ndarray, metadata: dict[int, bytes] | None = None) -> None:
    """Write an image, whole or not at all, in the format of `path`'s suffix, with what that holds of the metadata.

    Raises NotWritable, or Mismatch if the format can't hold such an image.
    """
    suffix = path.suffix.lower()
    quality = {".webp": cv2.IMWRITE_WEBP_QUALITY, ".avif": cv2.IMWRITE_AVIF_QUALITY}  # JPEG has 95
    how = [quality[suffix], 95] if suffix in quality else [cv2.IMWRITE_PNG_COMPRESSION, 3] if suffix == ".png" else []
    metadata = held(metadata or {}, suffix, image)
    values = [np.frombuffer(value, np.uint8)[None] for value in metadata.values()]
    try:
        encoder = ".jpg" if suffix in JPEG else suffix
        done, data = cv2.imencodeWithMetadata(encoder, image, list(metadata), values, how)
    except cv2.error:
        done = False
    if not done:
        raise Mismatch(f"{path} can't hold an image of shape {image.shape}, {image.dtype}")
    write_bytes(path, completed(data.tobytes(), suffix, metadata))


def thumbnail(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 as (1024,) float32 of mean 0 and length 1, so that products are correlations; 0 if flat."""
    grey = cv2.resize(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), (32, 32), interpolation=cv2.INTER_AREA)
    grey = grey.astype(np.float32).ravel()
    grey -= grey.mean()
    length = np.linalg.norm(grey)
    return grey / length if length > 32 else np.zeros_like(grey)  # 32: a standard deviation of one grey level


def shared_backgrounds(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> dict[str, list[str]]:
    """For each of `some` that shows the background of any of `others`, these; takes thumbnails by name."""
    if not others:
        return {}
    names, matrix = np.array(list(others)), np.stack([*others.values()])
    shared = {name: names[matrix @ thumb > SAME_BACKGROUND].tolist() for name, thumb in some.items()}
    return {name: same for name, same in shared.items() if same}

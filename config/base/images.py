"""Reading and writing image files: 8 or 16 bits, grey, colour or with alpha, always in BGR order.

A pair is one file: the clean background `B` in the left half, the rainy image `O` in the right half.
"""

import re
from pathlib import Path

import cv2
import numpy as np

from base.errors import DamagedFile, Mismatch, MissingFile, NotWritable
from base.files import write_bytes

SAME_BACKGROUND = 0.995  # correlation of thumbnails; in Rain800 the same background reaches 0.999, others 0.991 at most
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


def survey(folder: Path, recursive: bool = False) -> tuple[list[Path], dict[Path, str]]:
    """The image files of a folder in natural order ("2" before "10"), and why each other entry is left out.

    Both are empty if there is no such folder.
    """
    images: list[Path] = []
    left_out: dict[Path, str] = {}
    for path in sorted(folder.iterdir(), key=_natural) if folder.is_dir() else ():
        if path.suffix.lower() in SUFFIXES and path.is_file():
            images.append(path)
        else:
            left_out[path] = "no image"
    return images, left_out


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder in natural order; none if there is no such folder."""
    return survey(folder)[0]


def _natural(path: Path) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split("([0-9]+)", path.name.lower())]


def list_pairs(source: Path) -> list[Path]:
    """The pairs, or clean images, in a folder; or `source` itself if it is a file. Raises MissingFile if none is."""
    paths = [source] if source.is_file() else list_images(source)
    if not paths:
        raise MissingFile(f"{source} contains no images: convert.py makes data sets, folders of joined pairs")
    return paths


def read_image(path: Path) -> np.ndarray:
    """An upright image as (H, W) grey, (H, W, 3) or (H, W, 4), uint8 or uint16. Raises MissingFile or DamagedFile."""
    try:
        data = np.frombuffer(Path(path).read_bytes(), np.uint8)
    except OSError as error:
        raise MissingFile(f"can't read {path}: {error.strerror}") from None
    cut_off = bytes(data[:4]) == b"\x89PNG" and b"IEND" not in bytes(data[-64:])  # libpng would print a message
    image = None if cut_off else _decode(data, cv2.IMREAD_UNCHANGED)
    if image is not None and image.shape[2:] != (4,):  # IMREAD_UNCHANGED, which keeps alpha, ignores EXIF orientation
        image = _decode(data, cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH)
    if image is None:
        raise DamagedFile(f"{path} is not an image or is cut off: remove it or download it again")
    if image.dtype not in (np.uint8, np.uint16):
        raise DamagedFile(f"{path} has samples of type {image.dtype}, not 8 or 16 bits per channel")
    return image


def _decode(data: np.ndarray, flags: int) -> np.ndarray | None:
    (cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging).setLogLevel(0)  # OpenCV 5 moved it
    try:
        return cv2.imdecode(data, flags)
    except cv2.error:
        return None


def to_bgr8(image: np.ndarray) -> np.ndarray:
    """An image of `read_image` as (H, W, 3) BGR uint8: without alpha, 16 bits rounded to 8."""
    if image.dtype == np.uint16:
        image = ((image.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
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


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an image, whole or not at all, in the format of `path`'s suffix. Raises NotWritable."""
    how = {".webp": [cv2.IMWRITE_WEBP_QUALITY, 95], ".png": [cv2.IMWRITE_PNG_COMPRESSION, 3]}  # JPEG has quality 95
    done, data = cv2.imencode(path.suffix.lower(), image, how.get(path.suffix.lower(), []))
    if not done:
        raise NotWritable(f"can't encode {path}: shape {image.shape}, {image.dtype}")
    write_bytes(path, data.tobytes())


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

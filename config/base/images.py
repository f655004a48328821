"""Reading and writing image files: eight or sixteen bits, grey, colour or alpha, always in cv2's BGR order."""

import re
from pathlib import Path

import cv2
import numpy as np

from base.errors import UserError
from base.files import write_bytes

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


def list_images(folder: Path) -> list[Path]:
    """The image files of a folder in the order that a person counts in ("2" before "10")."""

    def natural(path: Path) -> list:
        return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", path.name.lower())]

    return sorted((p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file()), key=natural)


def read_image(path: Path) -> np.ndarray:
    """Decode an image file as it is, turned upright where its EXIF data say so.

    Returns (H, W) grey, (H, W, 3) BGR or (H, W, 4) BGRA, uint8 or uint16.
    Raises UserError where the file is missing, is no image, or is cut off.
    """
    try:
        data = np.frombuffer(Path(path).read_bytes(), np.uint8)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    # A cut-off PNG is told by its missing end, before libpng prints a complaint of its own.
    cut_off = bytes(data[:4]) == b"\x89PNG" and b"IEND" not in bytes(data[-64:])
    image = None if cut_off or data.size == 0 else _decode(data, cv2.IMREAD_UNCHANGED)
    if image is not None and (image.ndim == 2 or image.shape[2] == 3):
        # IMREAD_UNCHANGED leaves EXIF's orientation aside; without alpha this decodes the same samples, upright.
        image = _decode(data, cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH)
    if image is None:
        raise UserError(f"{path} is no image that can be read, or is cut off: remove it or fetch it again")
    if image.dtype not in (np.uint8, np.uint16):
        raise UserError(f"{path} has samples of type {image.dtype}; images of 8 or 16 bits a channel are read")
    return image


def _decode(data: np.ndarray, flags: int) -> np.ndarray | None:
    logging = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging  # OpenCV 5 moved it
    level = logging.setLogLevel(0)
    try:
        return cv2.imdecode(data, flags)
    except cv2.error:
        return None
    finally:
        logging.setLogLevel(level)


def to_bgr8(image: np.ndarray) -> np.ndarray:
    """Any image that `read_image` returns as (H, W, 3) BGR uint8; alpha is dropped, 16 bits are rounded to 8."""
    if image.dtype == np.uint16:
        image = ((image.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if image.ndim == 2:
        return np.repeat(image[..., None], 3, axis=2)
    return np.ascontiguousarray(image[..., :3])


def split_pair(image: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Cut a joined pair (H, 2W, 3) into the clean background `B` (left half) and the rainy image `O` (right half)."""
    if image.shape[1] % 2:
        raise UserError(
            f"{path} is {image.shape[1]} pixels wide, an odd number, so it is no pair of two images side by side: "
            "make the pairs with convert.py"
        )
    half = image.shape[1] // 2
    return image[:, :half], image[:, half:]


def read_pair(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a joined pair; returns (B, O), each (H, W, 3) BGR uint8. Raises UserError as `read_image` does."""
    return split_pair(to_bgr8(read_image(path)), path)


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an image in the format of `path`'s suffix; a kill leaves the old file or the new one, never a half.

    JPEG and WebP are written at quality 95; PNG, TIFF and BMP are lossless.
    """
    suffix = path.suffix.lower()
    quality = {".webp": [cv2.IMWRITE_WEBP_QUALITY, 95], ".png": [cv2.IMWRITE_PNG_COMPRESSION, 3]}
    if suffix in (".jpg", ".jpeg"):
        quality[suffix] = [cv2.IMWRITE_JPEG_QUALITY, 95]
    done, data = cv2.imencode(suffix, image, quality.get(suffix, []))
    if not done:
        raise UserError(f"{path} can't be encoded: shape {image.shape}, {image.dtype}")
    write_bytes(path, data.tobytes())

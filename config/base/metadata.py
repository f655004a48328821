"""What an image file says besides its pixels: how it is to be turned, EXIF, the colours' space, further pictures.

OpenCV carries EXIF and profiles; here is what it leaves out: TIFF's profile, AVIF's colour space and turns.
"""

import re
from typing import Literal

import cv2
import numpy as np

# Keys of metadata. CICP are four numbers (ITU-T H.273) that name a colour space.
EXIF, PROFILE, CICP = cv2.IMAGE_METADATA_EXIF, cv2.IMAGE_METADATA_ICCP, cv2.IMAGE_METADATA_CICP
NAMES = {EXIF: "EXIF", PROFILE: "colour profile", CICP: "a colour space without a profile"}
JPEG = {".jpg", ".jpeg", ".jpe", ".jfif"}
TIFF = {".tif", ".tiff"}
ORIENTATION, TIFF_PROFILE, PHOTOMETRIC, EXTRA_SAMPLES, MAKE, EXIF_DIRECTORY = 274, 34675, 262, 338, 271, 34665  # tags
SAMPLES, COLOUR_SPACE = 277, {301, 318, 319}  # transfer function, white point, primaries
CMYK = 5  # a value of PHOTOMETRIC
WIDTH, HEIGHT = 40962, 40963  # tags in the EXIF directory
SRGB = {b"gAMA": [45455], b"cHRM": [31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000]}  # in PNG files, 1/100000
LIKE_SRGB = {bytes([primaries, transfer]) for primaries in (1, 2) for transfer in (1, 2, 6, 13)}  # or unspecified
NCLX = b"colrnclx"


class Directory:
    """A directory (IFD) of TIFF data, which EXIF data is as well: the first one by default; empty for other data."""

    def __init__(self, data: bytes, start: int | None = None):
        self.data = data
        self.order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
        self.start = self.number(4, 4) if start is None else start
        count = self.number(self.start, 2) if self.start and data[:4] in (b"II*\0", b"MM\0*") else 0
        self.end = self.start + 2 + 12 * count  # there stands the next directory's position
        fields = range(self.start + 2, min(self.end, len(data)), 12)
        self.places = {self.number(at, 2): at for at in fields}  # by tag: each field has 12 bytes

    def number(self, at: int, size: int) -> int:
        return int.from_bytes(self.data[at : at + size], self.order)

    def value(self, tag: int) -> slice:
        """Where the value of a field of one number stands; an empty slice if there is no such field."""
        at = self.places.get(tag)
        return slice(0) if at is None else slice(at + 8, at + 8 + (4 if self.number(at + 2, 2) == 4 else 2))

    def get(self, tag: int) -> int:
        """The number of a field; 0 if there is no such field."""
        return int.from_bytes(self.data[self.value(tag)], self.order)


def orientation(exif: bytes) -> int:
    """1 to 8, as EXIF numbers the turns and reflections; 1 is upright."""
    number = Directory(exif).get(ORIENTATION)
    return number if 1 <= number <= 8 else 1


def turn(image: np.ndarray, number: int) -> np.ndarray:
    """An image (H, W) or (H, W, C) made upright, given its EXIF orientation."""
    image = image.swapaxes(0, 1) if number > 4 else image
    image = image[:, ::-1] if number in (2, 3, 6, 7) else image
    return np.ascontiguousarray(image[::-1] if number in (3, 4, 7, 8) else image)


def upright(exif: bytes, number: int) -> bytes:
    """EXIF data of an image after `turn`, without the thumbnail, which shows the image as it was."""
    first, out = Directory(exif), bytearray(exif)
    if ORIENTATION in first.places:
        place = first.value(ORIENTATION)
        out[place] = (1).to_bytes(place.stop - place.start, first.order)
    out[first.end : first.end + 4] = bytes(4)  # the thumbnail's directory is the next one
    inner = Directory(exif, first.get(EXIF_DIRECTORY))
    if number > 4 and {WIDTH, HEIGHT} <= inner.places.keys():
        fields = [slice(at + 2, at + 12) for at in (inner.places[WIDTH], inner.places[HEIGHT])]
        out[fields[0]], out[fields[1]] = out[fields[1]], out[fields[0]]
    return bytes(out)


def held(metadata: dict[int, bytes], suffix: str, image: np.ndarray) -> dict[int, bytes]:
    """The part of an image's metadata that a file with this suffix can hold."""
    grey = image.ndim == 2 and suffix != ".webp"
    profile_fits = metadata.get(PROFILE, b"")[16:20] == (b"GRAY" if grey else b"RGB ")
    fits = {EXIF: suffix not in TIFF, PROFILE: profile_fits, CICP: suffix in (".png", ".avif")}
    formats, most = {*JPEG, *TIFF, ".png", ".webp", ".avif"}, 65000 if suffix in JPEG else 1 << 31
    return {key: data for key, data in metadata.items() if suffix in formats and fits[key] and len(data) < most}


def tiff_profile(directory: Directory) -> bytes:
    at = directory.places.get(TIFF_PROFILE, 0)
    start = directory.number(at + 8, 4)
    return directory.data[start : start + directory.number(at + 4, 4)] if at else b""


def with_profile(tiff: bytes, profile: bytes) -> bytes:
    """A TIFF file's bytes with a colour profile, which stands at the end, before a new first directory."""
    first, order = Directory(tiff), Directory(tiff).order
    body = tiff + bytes(len(tiff) % 2) + profile + bytes(len(profile) % 2)
    numbers = (TIFF_PROFILE, 2), (7, 2), (len(profile), 4), (len(tiff) + len(tiff) % 2, 4)  # 7: bytes of any meaning
    field = b"".join(number.to_bytes(size, order) for number, size in numbers)
    fields = sorted([*first.places.items(), (TIFF_PROFILE, -1)])
    table = b"".join(field if at < 0 else tiff[at : at + 12] for _, at in fields)
    end = len(fields).to_bytes(2, order) + table + bytes(4)
    return body[:4] + len(body).to_bytes(4, order) + body[8:] + end


def completed(data: bytes, suffix: str, metadata: dict[int, bytes]) -> bytes:
    """The bytes of a file that OpenCV has written, with what it leaves out of the metadata."""
    if suffix in TIFF and PROFILE in metadata:
        return with_profile(data, metadata[PROFILE])
    if suffix == ".avif" and CICP in metadata and NCLX in data:
        head, tail = data.split(NCLX, 1)
        return head + NCLX + b"\0%c\0%c" % (*metadata[CICP][:2],) + tail[4:]
    return data


def avif_facts(data: bytes) -> tuple[bytes, bytes, int, int]:
    """An AVIF's colour profile and CICP, if any, the orientation of its boxes, as EXIF's number, and its bits."""
    head = data[: data.find(b"mdat")]
    at, named, coding = head.find(b"colrprof"), head.find(NCLX) + len(NCLX), head.find(b"av1C")
    profile = head[at + 8 : at - 4 + int.from_bytes(head[at - 4 : at], "big")] if at > 0 else b""
    turns = head[head.find(b"irot") + 4] & 3 if b"irot" in head else 0  # quarter turns, counter-clockwise, then:
    mirror = head[head.find(b"imir") + 4] & 1 if b"imir" in head else None  # 0: upside down, 1: left and right
    numbers = {None: (1, 8, 3, 6), 0: (4, 5, 2, 7), 1: (2, 7, 4, 5)}
    deep = head[coding + 6] if coding > 0 else 0
    cicp = bytes([head[named + 1], head[named + 3], 0, 1]) if NCLX in head else b""  # as for RGB samples
    return profile, cicp, numbers[mirror][turns], 12 if deep & 32 else 10 if deep & 64 else 8


def jpeg_segments(data: bytes) -> tuple[list[bytes], int]:
    """The segments of a JPEG before its pixels, each a marker's byte and what it holds, and where the pixels begin."""
    at, segments = 2, []
    while data[at : at + 1] == b"\xff" and (marker := data[at + 1 : at + 2]) not in (b"", b"\xda"):
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        segments.append(marker + data[at + 4 : end])
        at = at + 1 if marker == b"\xff" else end  # any number of these may precede a marker
    return segments, at


def jpeg_profile(data: bytes) -> bytes:
    """A JPEG's colour profile; OpenCV takes other segments, such as those of further pictures, for parts of it."""
    parts = sorted(segment for segment in jpeg_segments(data)[0] if segment.startswith(b"\xe2ICC_PROFILE\0"))
    return b"".join(part[15:] for part in parts)


def unmultiplied(data: bytes) -> bytes:
    """A file's bytes; of a TIFF without the note that makes libtiff multiply the colours by alpha."""
    tags = Directory(data)
    if tags.get(EXTRA_SAMPLES) != 2:
        return data
    place = tags.value(EXTRA_SAMPLES)
    return data[: place.start] + (1).to_bytes(place.stop - place.start, tags.order) + data[place.stop :]


def made_upright(
    data: bytes, kind: str, image: np.ndarray, found: dict[int, bytes]
) -> tuple[np.ndarray, dict[int, bytes]]:
    """The decoded image of a file of this kind made upright, and its metadata, of which OpenCV has `found` some."""
    exif, profile, cicp = (found.get(key, b"") for key in (EXIF, PROFILE, CICP))
    exif = exif.removeprefix(b"Exif\0\0")
    number = orientation(exif)
    if kind == ".avif":
        profile, cicp, number, bits = avif_facts(data)
        if image.dtype == np.uint16:
            image = (image.astype(np.uint32) * 65535 // ((1 << bits) - 1)).astype(np.uint16)
    elif kind == ".jpg":
        profile = jpeg_profile(data)
    elif kind == ".tif":  # OpenCV has turned it, and made CMYK colours and alpha
        profile = tiff_profile(Directory(data))
        image = image[..., :3] if Directory(data).get(PHOTOMETRIC) == CMYK else image
    cicp = b"" if cicp[:2] in LIKE_SRGB or (profile and kind == ".avif") else cicp
    metadata = {EXIF: upright(exif, number) if Directory(exif).places else b"", PROFILE: profile, CICP: cicp}
    return turn(image, number), {key: value for key, value in metadata.items() if value}


def png_chunks(data: bytes) -> dict[bytes, bytes]:
    """The chunks of a PNG before its pixels, by name; none of other files."""
    chunks, at = {}, 8
    while data[:4] == b"\x89PNG" and data[at + 4 : at + 8] not in (b"IDAT", b""):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        chunks[data[at + 4 : at + 8]], at = data[at + 8 : end - 4], end
    return chunks


def _not_srgb(chunks: dict[bytes, bytes]) -> bool:
    """Whether a PNG's gAMA or cHRM name a colour space that is not sRGB."""
    pairs = [
        (int.from_bytes(chunks[name][4 * i : 4 * i + 4], "big"), number)
        for name in SRGB.keys() & chunks.keys()
        for i, number in enumerate(SRGB[name])
    ]
    return b"sRGB" not in chunks and any(abs(found - number) > 100 for found, number in pairs)


def losses(data: bytes, image: np.ndarray, metadata: dict[int, bytes]) -> list[str]:
    """What is in a file besides its first image that `metadata` does not hold, in a few words each."""
    segments, tags, chunks, kept = jpeg_segments(data)[0], Directory(data), png_chunks(data), metadata.keys()
    has_profile = PROFILE in kept or b"iCCP" in chunks  # OpenCV leaves out the latter if it does not fit
    four_channels = any(re.match(rb"[\xc0-\xc3].{5}\x04", part, re.DOTALL) for part in segments)
    cmyk, channels = four_channels or tags.get(PHOTOMETRIC) == CMYK, 1 if image.ndim == 2 else image.shape[2]
    checks = {
        "CMYK": cmyk,
        "alpha or further channels": not cmyk and tags.get(SAMPLES) > channels,
        NAMES[CICP]: not {PROFILE, CICP} & kept and (_not_srgb(chunks) or COLOUR_SPACE & tags.places.keys()),
        "a profile of other colours": has_profile and PROFILE not in held(metadata, ".png", image),
        "further pictures (HDR gain map, depth)": any(part.startswith(b"\xe2MPF\0") for part in segments),
        "EXIF": {MAKE, EXIF_DIRECTORY} & tags.places.keys(),
        "XMP": re.search(rb"adobe(:ns:meta|\.com/xap|\.xmp)", data),
    }
    return [name for name, lost in checks.items() if lost]

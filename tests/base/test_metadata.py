"""EXIF, colour profiles, turns and what is lost, against what Pillow writes and reads."""

import io
import zlib

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps, PngImagePlugin

from base.images import read_image, read_picture, write_image
from base.metadata import CICP, EXIF, PROFILE, held

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "tif": "TIFF", "avif": "AVIF"}
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
DISPLAY_P3 = SRGB.replace(b"s\0R\0G\0B", b"P\0003\0 \0!")  # another profile of the same kind
GREY = SRGB[:16] + b"GRAY" + SRGB[20:]
MAKE, ORIENTATION, EXIF_DIRECTORY, GPS, WIDTH, HEIGHT = 271, 274, 34665, 34853, 40962, 40963


def make_exif(orientation: int, endian: str = ">") -> bytes:
    exif = Image.Exif()
    exif.endian = endian
    exif[MAKE], exif[ORIENTATION] = "A Camera", orientation
    exif.get_ifd(EXIF_DIRECTORY).update({WIDTH: 40, HEIGHT: 24})
    exif.get_ifd(GPS)[1] = "N"
    return exif.tobytes()


def make_image() -> Image.Image:
    """40 x 24 pixels, of which no turn or reflection gives the same."""
    corners = np.array([[[220, 30, 30], [30, 200, 30]], [[30, 30, 210], [200, 200, 200]]], np.uint8)
    return Image.fromarray(cv2.resize(corners, (40, 24), interpolation=cv2.INTER_LINEAR))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_orientation_is_undone(tmp_path, suffix, orientation):
    path = tmp_path / f"a.{suffix}"
    make_image().save(path, FORMATS[suffix], exif=make_exif(orientation))
    expected = Image.new("RGB", (40, 24))
    expected.paste(make_image())
    expected.getexif()[ORIENTATION] = orientation
    expected = np.asarray(ImageOps.exif_transpose(expected))[..., ::-1]
    image = read_image(path)
    assert image.shape == expected.shape
    assert np.abs(image.astype(int) - expected).mean() < 6


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("suffix", ["jpg", "jfif", "png", "webp", "avif"])
def test_exif_and_profile_come_back_upright(tmp_path, suffix, endian, orientation):
    path, result = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    exif = make_exif(orientation, endian)
    make_image().save(path, FORMATS.get(suffix, "JPEG"), exif=exif, icc_profile=DISPLAY_P3)
    picture = read_picture(path)
    assert picture.lost == []
    write_image(result, picture.image, picture.metadata)
    with Image.open(result) as written:
        found = written.getexif()
        assert (found[MAKE], found.get(ORIENTATION, 1), found.get_ifd(GPS)) == ("A Camera", 1, {1: "N"})
        assert tuple(found.get_ifd(EXIF_DIRECTORY)[tag] for tag in (WIDTH, HEIGHT)) == written.size
        assert written.info["icc_profile"] == DISPLAY_P3
        assert written.size == ((24, 40) if orientation == 6 else (40, 24))
    assert read_picture(result).metadata == picture.metadata


def test_the_thumbnail_of_the_rainy_photograph_is_cut_off(tmp_path):
    thumbnail = io.BytesIO()
    make_image().save(thumbnail, "JPEG")
    data = thumbnail.getvalue()
    first = b"MM\0*\0\0\0\x08" + b"\0\x01" + b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0" + b"\0\0\0\x1a"
    second = (
        b"\0\x02" + b"\x02\x01\0\x04\0\0\0\x01\0\0\0\x38" + b"\x02\x02\0\x04\0\0\0\x01" + len(data).to_bytes(4, "big")
    )
    make_image().save(tmp_path / "a.jpg", exif=b"Exif\0\0" + first + second + bytes(4) + data)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.getexif().get_ifd(ExifTags.IFD.IFD1)
    picture = read_picture(tmp_path / "a.jpg")
    write_image(tmp_path / "b.jpg", picture.image, picture.metadata)
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.getexif()[ORIENTATION] == 1
        assert not image.getexif().get_ifd(ExifTags.IFD.IFD1)


def test_a_profile_that_opencv_refuses_is_named(tmp_path):
    make_image().convert("L").save(tmp_path / "a.png", icc_profile=SRGB)
    assert len(read_picture(tmp_path / "a.png").lost) == 1


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_profile_is_kept_if_its_colours_are_those_of_the_pixels(tmp_path, suffix):
    for mode, profile, kept in (("RGB", SRGB, True), ("RGB", GREY, False), ("L", GREY, True), ("L", SRGB, False)):
        make_image().convert(mode).save(tmp_path / "a.jpg", icc_profile=profile)
        picture = read_picture(tmp_path / "a.jpg")
        assert (PROFILE in picture.metadata, len(picture.lost)) == (kept, int(not kept))
        write_image(tmp_path / f"b.{suffix}", picture.image, picture.metadata)
        in_file = kept and (mode, suffix) != ("L", "webp")  # WebP has no grey
        with Image.open(tmp_path / f"b.{suffix}") as image:
            assert image.info.get("icc_profile") == (profile if in_file else None)


def test_a_profile_in_parts_among_further_pictures_is_whole(tmp_path):
    """OpenCV takes the segments of further pictures (MPF), as telephones write them, for parts of the profile."""
    profile = DISPLAY_P3 + bytes(40000)
    make_image().save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[make_image()], icc_profile=profile)
    picture = read_picture(tmp_path / "a.jpg")
    assert picture.metadata == {PROFILE: profile}
    assert len(picture.lost) == 1
    make_image().save(tmp_path / "b.jpg", icc_profile=profile + bytes(90000))
    assert read_picture(tmp_path / "b.jpg").metadata == {PROFILE: profile + bytes(90000)}


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "I;16"])
def test_a_tiff_keeps_its_profile(tmp_path, mode):
    grey = mode in ("L", "I;16")
    pixels = np.asarray(make_image().convert(mode if mode != "I;16" else "L"))
    image = Image.fromarray(pixels.astype(np.uint16) * 257 if mode == "I;16" else pixels)
    image.save(tmp_path / "a.tif", icc_profile=GREY if grey else DISPLAY_P3)
    picture = read_picture(tmp_path / "a.tif")
    write_image(tmp_path / "b.tiff", picture.image, picture.metadata)
    with Image.open(tmp_path / "b.tiff") as written:
        assert written.info["icc_profile"] == (GREY if grey else DISPLAY_P3)
        assert written.mode == mode
    np.testing.assert_array_equal(read_image(tmp_path / "b.tiff"), picture.image)
    assert picture.lost == []


def test_the_colours_of_a_tiff_are_not_multiplied_by_its_alpha(tmp_path):
    image = make_image()
    image.putalpha(image.convert("L"))
    image.save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), np.asarray(image)[..., [2, 1, 0, 3]])


@pytest.mark.parametrize("bits", [10, 12])
def test_samples_of_10_and_12_bits_fill_16(tmp_path, bits):
    image = np.full((16, 16, 3), (1 << bits) - 1, np.uint16)
    how = [cv2.IMWRITE_AVIF_DEPTH, bits, cv2.IMWRITE_AVIF_QUALITY, 100]
    (tmp_path / "a.avif").write_bytes(cv2.imencode(".avif", image, how)[1].tobytes())
    assert read_image(tmp_path / "a.avif").mean() > 65000


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif", "avif"])
def test_frames_after_the_first_are_named(tmp_path, suffix):
    frames = [make_image(), make_image().transpose(0), make_image().transpose(1)]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    picture = read_picture(tmp_path / f"a.{suffix}")
    assert len(picture.lost) == 1
    assert picture.image.shape[:2] == (24, 40)
    frames[0].save(tmp_path / f"b.{suffix}")
    assert read_picture(tmp_path / f"b.{suffix}").lost == []


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_is_named_and_gives_three_channels(tmp_path, suffix):
    make_image().convert("CMYK").save(tmp_path / f"a.{suffix}", icc_profile=SRGB[:16] + b"CMYK" + SRGB[20:])
    picture = read_picture(tmp_path / f"a.{suffix}")
    assert "CMYK" in picture.lost
    assert picture.metadata == {}
    assert np.abs(picture.image[..., ::-1].astype(int) - np.asarray(make_image())).mean() < 6


def test_exif_of_a_tiff_is_named(tmp_path):
    make_image().save(tmp_path / "a.tif", exif=make_exif(1))
    assert len(read_picture(tmp_path / "a.tif").lost) == 1


def test_what_a_jpeg_can_not_hold_does_not_spoil_it(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    write_image(tmp_path / "a.jpg", image, {EXIF: make_exif(1)[6:], PROFILE: SRGB + bytes(90000)})
    assert read_picture(tmp_path / "a.jpg").metadata == {EXIF: make_exif(1)[6:]}


@pytest.mark.parametrize("length", [*range(0, 40), 60])
def test_damaged_exif_is_no_reason_to_refuse_an_image(tmp_path, length):
    exif = make_exif(6)[6:]
    make_image().save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif[:length])
    make_image().save(tmp_path / "b.jpg", exif=b"Exif\0\0" + exif[:4] + b"\xff" * length)
    for name in "ab":
        picture = read_picture(tmp_path / f"{name}.jpg")
        write_image(tmp_path / "c.jpg", picture.image, picture.metadata)
        assert sorted(read_image(tmp_path / "c.jpg").shape) == [3, 24, 40]


def add_chunk(path, name: bytes, value: bytes) -> None:
    """Put a chunk before a PNG's pixels."""
    data, chunk = path.read_bytes(), name + value
    path.write_bytes(
        data[:33] + len(value).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[33:]
    )


@pytest.mark.parametrize("target", ["png", "avif"])
@pytest.mark.parametrize("source", ["png", "avif"])
def test_a_colour_space_without_a_profile_comes_back(tmp_path, source, target):
    path = tmp_path / f"a.{source}"
    write_image(path, np.asarray(make_image()), {CICP: bytes([12, 13, 0, 1])})
    picture = read_picture(path)
    assert (picture.metadata, picture.lost) == ({CICP: bytes([12, 13, 0, 1])}, [])
    write_image(tmp_path / f"b.{target}", picture.image, picture.metadata)
    assert read_picture(tmp_path / f"b.{target}").metadata == picture.metadata
    with Image.open(tmp_path / f"b.{target}") as written:
        assert np.abs(np.asarray(written).astype(int)[..., ::-1] - picture.image).mean() < 6
    assert CICP not in held(picture.metadata, ".jpg", picture.image)


@pytest.mark.parametrize(
    ("chunks", "lost"),
    [
        ({b"gAMA": [100000]}, 1),
        ({b"gAMA": [45455], b"cHRM": [31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000]}, 1),
        ({b"gAMA": [45454], b"cHRM": [31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000]}, 0),
        ({b"gAMA": [100000], b"sRGB": []}, 0),  # which counts for more
        ({b"cHRM": [1]}, 1),  # damaged
    ],
)
def test_a_colour_space_that_is_not_kept_is_named(tmp_path, chunks, lost):
    make_image().save(tmp_path / "a.png")
    for name, numbers in chunks.items():
        value = b"".join(number.to_bytes(4, "big") for number in numbers)
        add_chunk(tmp_path / "a.png", name, value or b"\0")
    assert len(read_picture(tmp_path / "a.png").lost) == lost
    make_image().save(tmp_path / "a.tif", tiffinfo={319: (0.68, 0.32, 0.265, 0.69, 0.15, 0.06)})
    assert len(read_picture(tmp_path / "a.tif").lost) == 1


def test_alpha_that_opencv_leaves_out_is_named(tmp_path):
    make_image().convert("LA").save(tmp_path / "a.tif")
    picture = read_picture(tmp_path / "a.tif")
    assert (picture.image.shape, len(picture.lost)) == ((24, 40), 1)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
def test_xmp_is_named(tmp_path, suffix):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"></x:xmpmeta>'
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp.decode(), zip=True)
    more = {"png": {"pnginfo": text}, "tif": {"tiffinfo": {700: xmp}}}.get(suffix, {"xmp": xmp})
    make_image().save(tmp_path / f"a.{suffix}", **more)
    assert read_picture(tmp_path / f"a.{suffix}").lost == ["XMP"]

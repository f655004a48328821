"""Image files: round trips, damaged files and pairs."""

import os
import struct
import zlib

import cv2
import numpy as np
import pytest

from base.errors import DamagedFile, Mismatch, MissingFile, OutOfMemory
from base.images import (
    kind_of,
    list_images,
    read_image,
    read_pair,
    shared_backgrounds,
    survey,
    thumbnail,
    to_bgr8,
    write_image,
)
from conftest import make_pair

RNG = np.random.default_rng(0)
IMAGES = {
    "grey": RNG.integers(0, 256, (20, 30), np.uint8),
    "colour": RNG.integers(0, 256, (20, 30, 3), np.uint8),
    "alpha": RNG.integers(0, 256, (20, 30, 4), np.uint8),
    "grey16": RNG.integers(0, 65536, (20, 30), np.uint16),
    "colour16": RNG.integers(0, 65536, (20, 30, 3), np.uint16),
    "alpha16": RNG.integers(0, 65536, (20, 30, 4), np.uint16),
}
LARGER = np.repeat(np.repeat(IMAGES["colour"], 4, 0), 4, 1)


@pytest.mark.parametrize("kind", IMAGES)
def test_png_round_trip(tmp_path, kind):
    write_image(tmp_path / "a.png", IMAGES[kind])
    image = read_image(tmp_path / "a.png")
    assert image.dtype == IMAGES[kind].dtype
    np.testing.assert_array_equal(image, IMAGES[kind])
    assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tiff", ".webp"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9])
def test_cut_off_file_raises_without_messages_of_libraries(tmp_path, suffix, kept, capfd):
    path = tmp_path / f"a{suffix}"
    write_image(path, LARGER)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(DamagedFile):
        read_image(path)
    assert "rror" not in capfd.readouterr().err.replace("TIFF", "")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tiff", ".webp", ".gif", ".jp2", ".avif"])
def test_bytes_behind_the_end_are_no_fault(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(cv2.imencode(suffix, LARGER)[1].tobytes())
    image = read_image(path)
    for tail in (bytes(700), bytes(range(256))):
        (tmp_path / f"b{suffix}").write_bytes(path.read_bytes() + tail)
        np.testing.assert_array_equal(read_image(tmp_path / f"b{suffix}"), image)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("filler", [0, 1, 170])
def test_a_cut_off_file_is_refused_whatever_follows(tmp_path, suffix, filler, capfd):
    """A download that was stopped may have its full length."""
    path = tmp_path / f"a{suffix}"
    write_image(path, LARGER)
    data = path.read_bytes()
    for kept in (0.1, 0.5, 0.9, 1 - 2 / len(data)):
        path.write_bytes(data[: int(kept * len(data))] + bytes([filler]) * len(data))
        with pytest.raises(DamagedFile):
            read_image(path)
    assert capfd.readouterr().err == ""


def make_png(width: int, height: int) -> bytes:
    """A PNG that claims this size."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT": zlib.compress(bytes(99))}
    parts = [(name, data, zlib.crc32(name + data)) for name, data in (chunks | {b"IEND": b""}).items()]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(f">I4s{len(d)}sI", len(d), n, d, c) for n, d, c in parts)


def test_an_image_beyond_opencvs_limit_is_too_large_not_damaged(tmp_path):
    (tmp_path / "a.png").write_bytes(make_png(40000, 40000))
    with pytest.raises(OutOfMemory):
        read_image(tmp_path / "a.png")


def test_an_image_is_decoded_once(tmp_path, monkeypatch):
    calls = []
    decode = cv2.imdecodeWithMetadata
    monkeypatch.setattr(cv2, "imdecodeWithMetadata", lambda *a, **k: calls.append(1) or decode(*a, **k))
    monkeypatch.setattr(cv2, "imdecode", None)
    for suffix in (".jpg", ".png"):
        write_image(tmp_path / f"a{suffix}", IMAGES["colour"])
        read_image(tmp_path / f"a{suffix}")
    assert len(calls) == 2


@pytest.mark.parametrize("suffix", [".jpg", ".jpe", ".jfif", ".JPG", ".png", ".webp", ".tif", ".bmp", ".avif"])
def test_an_image_is_written_in_the_format_of_its_suffix(tmp_path, suffix):
    write_image(tmp_path / f"a{suffix}", IMAGES["colour"])
    (tmp_path / f"a{suffix}").rename(tmp_path / "a")
    assert kind_of(tmp_path / "a") == {".jpe": ".jpg", ".jfif": ".jpg", ".JPG": ".jpg"}.get(suffix, suffix)


@pytest.mark.parametrize(("suffix", "side"), [(".jpg", 70000), (".webp", 20000)])
def test_a_side_that_a_format_does_not_hold(tmp_path, suffix, side):
    with pytest.raises(Mismatch):
        write_image(tmp_path / f"a{suffix}", np.zeros((side, 1, 3), np.uint8))
    assert os.listdir(tmp_path) == []


def test_file_that_is_missing_or_of_another_depth(tmp_path):
    with pytest.raises(MissingFile):
        read_image(tmp_path / "absent.png")
    cv2.imwrite(str(tmp_path / "float.tiff"), np.zeros((4, 4), np.float32))
    with pytest.raises(DamagedFile):
        read_image(tmp_path / "float.tiff")


@pytest.mark.parametrize("head", [b"II+\0\x08\0\0\0", b"MM\0+\0\x08\0\0"])
def test_a_bigtiff_is_refused_by_its_kind(tmp_path, head, monkeypatch):
    monkeypatch.setattr(cv2, "imdecodeWithMetadata", None)
    (tmp_path / "a.tif").write_bytes(head + bytes(900))
    assert not kind_of(tmp_path / "a.tif").startswith(".")
    with pytest.raises(DamagedFile):
        read_image(tmp_path / "a.tif")


def test_to_bgr8():
    for image in IMAGES.values():
        bgr = to_bgr8(image)
        assert (bgr.shape, bgr.dtype) == ((20, 30, 3), np.uint8)
    assert to_bgr8(np.array([[0, 128, 129, 65535]], np.uint16))[0, :, 0].tolist() == [0, 0, 1, 255]
    np.testing.assert_array_equal(to_bgr8(IMAGES["alpha"]), IMAGES["alpha"][..., :3])


def test_pairs(tmp_path):
    write_image(tmp_path / "a.png", IMAGES["colour"])
    B, O = read_pair(tmp_path / "a.png")
    np.testing.assert_array_equal(np.hstack([B, O]), IMAGES["colour"])
    write_image(tmp_path / "b.png", IMAGES["colour"][:, :29])
    with pytest.raises(Mismatch):
        read_pair(tmp_path / "b.png")


def test_files_are_listed_in_natural_order(tmp_path):
    for name in ("10.png", "2.PNG", "1.jpg", "a2b10.tif", "a2b9.tif", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "3.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["1.jpg", "2.PNG", "10.png", "a2b9.tif", "a2b10.tif"]


def test_names_with_other_digits_are_listed(tmp_path):
    for name in ("m².png", "2²1.png", "².png", "٣.png", "1.png", "a.png"):
        (tmp_path / name).touch()
    assert len(list_images(tmp_path)) == 6


VIDEO = b"\0\0\0\x20ftypisom\0\0\2\0isomiso2" + bytes(500)
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500)


def test_what_opencv_reads_is_an_image_whatever_it_is_called(tmp_path):
    names = [".jfif", ".jpe", ".avif", ".gif", ".jp2", ".JPG", ".Tiff", "", ".jpg.bak", os.fsdecode(b"\xff")]
    for index, name in enumerate(names):
        form = name.lower() if name in (".avif", ".gif", ".jp2", ".Tiff") else ".jpg"
        data = cv2.imencode(form, LARGER)[1].tobytes()
        (tmp_path / f"{index}{name}").write_bytes(data)
    images, left_out = survey(tmp_path)
    assert [path.name for path in images] == [f"{index}{name}" for index, name in enumerate(names)]
    assert left_out == {}
    assert {read_image(path).shape for path in images} == {(80, 120, 3)}


def test_what_is_left_out_is_named_with_its_reason(tmp_path):
    data = cv2.imencode(".tif", IMAGES["colour"])[1].tobytes()
    files = {"notes.txt": b"notes", "clip.mp4": VIDEO, "a.HEIC": HEIC, "b.dng": data, "empty": b"", ".DS_Store": b"x"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "dangling.png").symlink_to("nowhere")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe")
    images, left_out = survey(tmp_path)
    assert images == []
    assert {path.name for path in left_out} == {*files, "dangling.png", "folder.png", "pipe"} - {".DS_Store"}
    assert len(set(left_out.values())) == len(left_out)
    for name in ("clip.mp4", "a.HEIC", "b.dng", "empty", "notes.txt"):
        with pytest.raises(DamagedFile):  # also where it is named alone
            read_image(tmp_path / name)


def test_folders_in_folders_are_read_once_each(tmp_path):
    for name in ("10.png", "2/b.png", "2/a/c.png", "elsewhere/d.png"):
        write_image(tmp_path / "in" / name if name[0] != "e" else tmp_path / name, IMAGES["grey"])
    (tmp_path / "in/2/loop").symlink_to("..")
    (tmp_path / "in/linked").symlink_to("../elsewhere")
    images, left_out = survey(tmp_path / "in", recursive=True)
    found = [path.relative_to(tmp_path / "in").as_posix() for path in images]
    assert found == ["2/a/c.png", "2/b.png", "10.png", "linked/d.png"]
    assert [path.name for path in left_out] == ["loop"]
    assert {path.name for path in survey(tmp_path / "in")[1]} == {"2", "linked"}
    assert survey(tmp_path / ("x" * 300)) == ([], {})


def test_folders_of_results_are_left_out_but_for_the_one_that_is_named(tmp_path):
    for name in ("a.png", "out/b.png", "sub/out/c.png"):
        write_image(tmp_path / name, IMAGES["grey"])
    results = tmp_path, tmp_path / "sub/../out", tmp_path / "absent"
    images, left_out = survey(tmp_path, recursive=True, results=results)
    assert [path.relative_to(tmp_path).as_posix() for path in images] == ["a.png", "sub/out/c.png"]
    assert [path.name for path in left_out] == ["out"]


def test_backgrounds_are_found_in_another_size_and_brightness():
    pictures = {f"{seed}.png": make_pair(90, 120, seed)[0] for seed in range(6)}
    known = {name: thumbnail(B) for name, B in pictures.items()}
    others = {
        "smaller": thumbnail(cv2.resize(pictures["2.png"], (60, 45), interpolation=cv2.INTER_AREA)),
        "darker": thumbnail((pictures["4.png"] * 0.7).astype(np.uint8)),
        "copy": thumbnail(pictures["4.png"]),
        "flat": thumbnail(np.full((40, 40, 3), 99, np.uint8)),
        "unknown": thumbnail(make_pair(90, 120, 7)[0]),
    }
    assert shared_backgrounds(known, others) == {"2.png": ["smaller"], "4.png": ["darker", "copy"]}
    assert shared_backgrounds(known, {}) == shared_backgrounds({}, known) == {}
    flat = {"flat": others["flat"]}
    assert shared_backgrounds(flat, flat) == {}  # what has no shape is like nothing

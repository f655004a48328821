"""Image files: round trips, damaged files and pairs."""

import os

import cv2
import numpy as np
import pytest

from base.errors import DamagedFile, Mismatch, MissingFile
from base.images import list_images, read_image, read_pair, shared_backgrounds, thumbnail, to_bgr8, write_image
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
    write_image(path, np.repeat(np.repeat(IMAGES["colour"], 4, 0), 4, 1))
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(DamagedFile):
        read_image(path)
    assert "rror" not in capfd.readouterr().err.replace("TIFF", "")


def test_file_that_is_missing_or_of_another_depth(tmp_path):
    with pytest.raises(MissingFile):
        read_image(tmp_path / "absent.png")
    cv2.imwrite(str(tmp_path / "float.tiff"), np.zeros((4, 4), np.float32))
    with pytest.raises(DamagedFile):
        read_image(tmp_path / "float.tiff")


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

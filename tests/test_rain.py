"""The command line of rain.py: pairs that `draw` writes, what `compare` prints, refusals."""

import cv2
import numpy as np
import pytest

import rain
from base.errors import BadArgument, MissingFile, Occupied, UserError
from base.images import read_pair
from synthesis.styles import STYLES


@pytest.fixture
def clean_folder(tmp_path):
    folder = tmp_path / "clean"
    folder.mkdir()
    for name, size in (("a.png", (40, 50)), ("b.jpg", (30, 60))):
        cv2.imwrite(str(folder / name), np.random.default_rng(0).integers(0, 200, (*size, 3), np.uint8))
    return folder


def test_draw_round_trip(clean_folder, tmp_path, capsys):
    target = tmp_path / "deep" / "pairs"
    arguments = ["draw", str(clean_folder), str(target), "--style", "rain800", "--count", "2", "--seed", "3"]
    rain.main(arguments)
    drawn = target / "drawn.txt"
    assert sorted(target.iterdir()) == [*(target / f"{name}.png" for name in ("a_x1", "a_x2", "b_x1", "b_x2")), drawn]
    assert drawn.read_text() == "synthetic rain: rain800, 2 on each of 2 images, seed 3\n"
    clean, rainy = read_pair(target / "a_x1.png")
    assert np.array_equal(clean, cv2.imread(str(clean_folder / "a.png")))
    assert (rainy >= clean).all()
    assert (rainy > clean).any()
    first = {path.name: path.read_bytes() for path in target.iterdir()}
    assert first["a_x1.png"] != first["a_x2.png"]

    rain.main(arguments)  # a second run writes the same
    assert {path.name: path.read_bytes() for path in target.iterdir()} == first
    alone = tmp_path / "alone"  # an image's rain does not depend on its neighbours
    rain.main(["draw", str(clean_folder / "b.jpg"), str(alone), "--style", "rain800", "--seed", "3"])
    assert (alone / "b_x1.png").read_bytes() == first["b_x1.png"]

    capsys.readouterr()
    rain.main(["compare", str(target), "--style", "rain100l", "--count", "3"])
    assert capsys.readouterr().out == rain.comparison(sorted(target.glob("*.png")), "rain100l", 3, 0) + "\n"


def test_draw_on_the_clean_halves_of_pairs(clean_folder, tmp_path):
    rain.main(["draw", str(clean_folder / "a.png"), str(tmp_path / "pairs")])
    rain.main(["draw", "--pairs", str(tmp_path / "pairs"), str(tmp_path / "again"), "--style", "rain100l"])
    clean, rainy = read_pair(tmp_path / "again" / "a_x1_x1.png")
    assert np.array_equal(clean, cv2.imread(str(clean_folder / "a.png")))
    assert not np.array_equal(rainy, read_pair(tmp_path / "pairs" / "a_x1.png")[1])


def test_draw_records_direction_and_radius(clean_folder, tmp_path):
    rain.main(
        ["draw", str(clean_folder), str(tmp_path / "pairs"), "--style", "intensity", "--count", "2", "--seed", "5"]
    )
    header, *rows = (tmp_path / "pairs" / "drawn.csv").read_text().splitlines()
    assert header == "image,degrees,radius"
    expected = []
    for stem in ("a", "b"):
        for number in (0, 1):
            angle, radius = STYLES["intensity"].choose(rain.picture_generator(5, stem, number))
            expected.append(f"{stem}_x{number + 1}.png,{angle:g},{radius:g}")
    assert rows == expected


def test_refusals(clean_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFile, match="empty"):
        rain.main(["draw", str(tmp_path / "empty"), str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"absent\.png"):
        rain.main(["draw", str(tmp_path / "absent.png"), str(tmp_path / "out")])
    with pytest.raises(Occupied):
        rain.main(["draw", str(clean_folder), str(clean_folder)])
    (clean_folder / "a.bmp").write_bytes(b"")
    with pytest.raises(BadArgument, match="a"):
        rain.main(["draw", str(clean_folder), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [["--count", "0"], ["--seed", "-1"], ["--style", "snow"], ["--count", "two"]])
def test_wrong_arguments(wrong, clean_folder, tmp_path):
    with pytest.raises(UserError, match=wrong[0]):
        rain.main(["draw", str(clean_folder), str(tmp_path / "out"), *wrong])
    assert not (tmp_path / "out").exists()

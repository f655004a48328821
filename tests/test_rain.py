"""The command line of rain.py: pairs that `draw` writes, what `compare` prints, refusals."""

import shlex

import cv2
import numpy as np
import pytest

import rain
from base.errors import BadArgument, Mismatch, MissingFile, Occupied, UserError
from base.images import list_images, read_pair
from conftest import make_pair
from datasets.layouts import SPLITS
from synthesis.styles import STYLES


@pytest.fixture
def clean_folder(tmp_path):
    folder = tmp_path / "clean"
    folder.mkdir()
    for name, size in (("a.png", (40, 50)), ("b.jpg", (30, 60))):
        cv2.imwrite(str(folder / name), np.random.default_rng(0).integers(0, 200, (*size, 3), np.uint8))
    return folder


def test_draw_round_trip(clean_folder, tmp_path, capsys):
    target = tmp_path / "deep" / "train"
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
    alone = tmp_path / "alone" / "test"  # an image's rain does not depend on its neighbours
    rain.main(["draw", str(clean_folder / "b.jpg"), str(alone), "--style", "rain800", "--seed", "3"])
    assert (alone / "b_x1.png").read_bytes() == first["b_x1.png"]

    capsys.readouterr()
    rain.main(["compare", str(target), "--style", "rain100l", "--count", "3"])
    assert capsys.readouterr().out == rain.comparison(sorted(target.glob("*.png")), "rain100l", 3, 0) + "\n"


def test_what_draw_leaves_out_is_named(clean_folder, tmp_path, capsys):
    (clean_folder / "notes.txt").write_text("none")
    (clean_folder / "deep").mkdir()
    rain.main(["draw", str(clean_folder), str(tmp_path / "train")])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("notes.txt", "deep"))


def test_draw_on_the_clean_halves_of_pairs(clean_folder, tmp_path):
    rain.main(["draw", str(clean_folder / "a.png"), str(tmp_path / "pairs" / "train")])
    rain.main(
        ["draw", "--pairs", str(tmp_path / "pairs" / "train"), str(tmp_path / "again" / "val"), "--style", "rain100l"]
    )
    clean, rainy = read_pair(tmp_path / "again" / "val" / "a_x1_x1.png")
    assert np.array_equal(clean, cv2.imread(str(clean_folder / "a.png")))
    assert not np.array_equal(rainy, read_pair(tmp_path / "pairs" / "train" / "a_x1.png")[1])


def test_draw_records_direction_and_radius(clean_folder, tmp_path):
    rain.main(
        [
            "draw",
            str(clean_folder),
            str(tmp_path / "pairs" / "train"),
            "--style",
            "intensity",
            "--count",
            "2",
            "--seed",
            "5",
        ]
    )
    header, *rows = (tmp_path / "pairs" / "train" / "drawn.csv").read_text().splitlines()
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
    for taken in (clean_folder, clean_folder / "a.png"):
        with pytest.raises(Occupied):
            rain.main(["draw", str(clean_folder), str(taken)])
    (clean_folder / "a.bmp").write_bytes(b"")
    with pytest.raises(BadArgument, match="a"):
        rain.main(["draw", str(clean_folder), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def photographs(folder, count: int, first: int = 0):
    folder.mkdir(exist_ok=True)
    for k in range(first, first + count):
        cv2.imwrite(str(folder / f"{k}.png"), make_pair(40, 48, k)[0])
    return folder


def drawn(target) -> dict[str, set[str]]:
    """The photographs in each split."""
    return {split: {path.stem.split("_")[0] for path in list_images(target / split)} for split in SPLITS}


def test_draw_makes_a_data_set_and_prints_the_command_that_trains_on_it(tmp_path, capsys):
    source, target = photographs(tmp_path / "my photos", 11), tmp_path / "data set"
    arguments = ["draw", str(source), str(target), "--count", "2", "--style", "rain800"]
    rain.main(arguments)
    splits = drawn(target)
    assert [len(splits[split]) for split in SPLITS] == [7, 2, 2]
    assert set.union(*splits.values()) == {str(k) for k in range(11)}
    assert [len(list_images(target / split)) for split in SPLITS] == [14, 4, 4]
    assert (target / "val/drawn.txt").read_text() == "synthetic rain: rain800, 2 on each of 2 images, seed 0\n"
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[-6:] == ["-a", "train", "-p", "sdsen", "--data_dir", str(target)]
    first = {path: path.read_bytes() for path in target.rglob("*.*")}
    rain.main(arguments)
    assert {path: path.read_bytes() for path in target.rglob("*.*")} == first
    rain.main([*arguments[:2], str(tmp_path / "other"), "--seed", "4", "--style", "rain100l"])
    assert drawn(tmp_path / "other") == splits  # other rain on the same photographs
    rain.main([*arguments[:2], str(tmp_path / "more"), "--style", "rain800", "--val", "5", "--test", "0"])
    assert [len(found) for found in drawn(tmp_path / "more").values()] == [6, 5, 0]


def test_images_of_one_photograph_stay_in_one_split(tmp_path):
    source = photographs(tmp_path / "clean", 12)
    for k in range(12):  # smaller, and of another format
        image = cv2.imread(str(source / f"{k}.png"))
        cv2.imwrite(str(source / f"{k + 100}.jpg"), cv2.resize(image, (36, 30), interpolation=cv2.INTER_AREA))
    rain.main(["draw", str(source), str(tmp_path / "set"), "--val", "6", "--test", "6"])
    splits = drawn(tmp_path / "set")
    assert [len(splits[split]) for split in SPLITS] == [12, 6, 6]
    for names in splits.values():
        assert {str((int(name) + 100) % 200) for name in names} == names


def test_a_data_set_is_not_mixed_with_another(tmp_path):
    source, target = photographs(tmp_path / "clean", 5), tmp_path / "set"
    rain.main(["draw", str(source), str(target)])
    before = {path: path.read_bytes() for path in target.rglob("*.*")}
    photographs(source, 20, first=5)  # after which other photographs are in `val`
    with pytest.raises(Occupied):
        rain.main(["draw", str(source), str(target)])
    with pytest.raises(Occupied):  # the clean images would be in the way
        rain.main(["draw", "--pairs", str(target / "train"), str(target)])
    assert {path: path.read_bytes() for path in target.rglob("*.*")} == before


def test_too_few_photographs_for_three_splits(tmp_path):
    source = photographs(tmp_path / "clean", 2)
    same = photographs(tmp_path / "same", 1)
    for k in range(1, 5):
        (same / f"{k}.png").write_bytes((same / "0.png").read_bytes())
    for arguments in (
        [source, tmp_path / "out"],
        [same, tmp_path / "out"],
        [source, tmp_path / "out", "--val", "2", "--test", "0"],
        [source, tmp_path / "out" / "train", "--val", "1"],  # which is one split
        [source, tmp_path / "out", "--val", "-1"],
    ):
        with pytest.raises(BadArgument):
            rain.main(["draw", *map(str, arguments)])
        assert not (tmp_path / "out").exists()
    rain.main(["draw", str(source), str(tmp_path / "out"), "--val", "0", "--test", "0", "--style", "rain800"])
    assert drawn(tmp_path / "out") == {"train": {"0", "1"}, "val": set(), "test": set()}


@pytest.mark.parametrize("wrong", [["--count", "0"], ["--seed", "-1"], ["--style", "snow"], ["--count", "two"]])
def test_wrong_arguments(wrong, clean_folder, tmp_path):
    with pytest.raises(UserError, match=wrong[0]):
        rain.main(["draw", str(clean_folder), str(tmp_path / "out"), *wrong])
    assert not (tmp_path / "out").exists()


def test_joined_pairs_and_single_images_are_not_mistaken(tmp_path):
    source = photographs(tmp_path / "clean", 11)
    rain.main(["draw", str(source), str(tmp_path / "set")])
    pairs = tmp_path / "set/train"
    for arguments in (
        ["draw", pairs, tmp_path / "out"],
        ["draw", "--pairs", source, tmp_path / "out"],
        ["compare", source],
    ):
        with pytest.raises(Mismatch):
            rain.main([*map(str, arguments)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["set", "set/train"])
def test_other_rain_does_not_replace_what_is_there(tmp_path, target):
    source = photographs(tmp_path / "clean", 4)
    arguments = ["draw", str(source), str(tmp_path / target)]
    rain.main(arguments)
    photographs(tmp_path / "others", 4, first=4)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    for other in (["--style", "rain800"], ["--seed", "1"]):
        with pytest.raises(Occupied):
            rain.main([*arguments, *other])
    with pytest.raises(Occupied):
        rain.main(["draw", str(tmp_path / "others"), *arguments[2:]])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_broken_images_are_named_and_the_others_drawn_on(tmp_path, capsys):
    source = photographs(tmp_path / "clean", 6)
    (source / "1.png").rename(source / "\udcff.png")  # its name is no UTF-8
    (source / "3.png").write_bytes((source / "3.png").read_bytes()[:-100])
    assert rain.main(["draw", str(source), str(tmp_path / "set"), "--style", "intensity"]) == 1
    assert set.union(*drawn(tmp_path / "set").values()) == {"0", "2", "4", "5", "\udcff"}
    assert "3.png" in capsys.readouterr().out
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/1.png").write_text("none")
    with pytest.raises(UserError):
        rain.main(["draw", str(tmp_path / "broken"), str(tmp_path / "train")])


def test_what_a_training_lacks_is_said(tmp_path, capsys):
    source = photographs(tmp_path / "clean", 6)
    for target, lacking in (("a", ["--val", "0"]), ("b/train", []), ("c", ["--test", "0"])):
        rain.main(["draw", str(source), str(tmp_path / target), *lacking])
        last = capsys.readouterr().out.splitlines()[-1]
        assert ("main.py" in last) == (target == "c")
        assert str(tmp_path / target if target == "c" else tmp_path / target[0] / "val") in last

"""What is read from a download's names and images: splits, pairs, names, the clean side."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from base.errors import BadArgument
from conftest import make_pair
from datasets import layouts
from datasets.layouts import Found, Pair, choose_validation, make_names_unique, pair_by_name, rain_side, split_of


@pytest.mark.parametrize(
    ("set_name", "folder", "split"),
    [
        ("rain100h", "Rain100H/train/rain", "train"),
        ("rain100h", "test/Rain100H/rainy", "test"),
        ("rain100h", "train/Rain100H/rain", "train"),
        ("rain100h", "Rain100H", "test"),
        ("rain100h", "train/RainTrainL", ""),
        ("rain1200", "DID-MDN-training/Rain_Light/train2018new", "train"),
        ("rain800", "test_nature", ""),
        ("rain800", "test/real", ""),
        ("rain800", "pictures", ""),
        ("rain12", "input", "test"),
    ],
)
def test_folder_names_tell_the_split(set_name, folder, split):
    assert split_of(set_name, Path("/home/download"), Path(folder).parts) == split


def test_folders_and_names_tell_the_role():
    for path, role in {
        "rain/X2/norain-1x2.png": "rainy",
        "norain/rain-1.png": "clean",
        "001_GT.png": "clean",
        "001_in.png": "rainy",
        "rain-1.png": "rainy",
        "train/1.png": "",
        "terrain/1.png": "",
    }.items():
        assert layouts.role_of(Path(path), Path(path).parts[:-1]) == role


def test_every_image_without_one_partner_is_left_out():
    found = {
        "clean": ["1.png", "norain-2.png", "2.png", "3.png"],
        "rainy": ["1.png", "1_5.png", "rain-2.png", "4.png"],
        "": ["5.png"],
    }
    images = [Found(Path(role or "other") / name, (), role) for role, names in found.items() for name in names]
    pairs, left_out = pair_by_name(images)
    assert [(str(pair.rainy), str(pair.clean), pair.name) for pair in pairs] == [
        ("rainy/1.png", "clean/1.png", "1"),
        ("rainy/1_5.png", "clean/1.png", "1_5"),
    ]
    assert [line.partition(":")[0] for line in left_out] == [
        "rainy/rain-2.png",
        "rainy/4.png",
        "clean/3.png",
        "other/5.png",
    ]


def test_names_become_unique_by_folders():
    def names(*paths: str) -> list[str]:
        pairs = [Pair(Path(path), None, Path(path).parts[:-1], Path(path).stem) for path in paths]
        make_names_unique(pairs)
        return [pair.name for pair in pairs]

    assert names("set/a/1.png", "set/b/2.png") == ["1", "2"]
    assert names("set/a/1.png", "set/b/1.png") == ["a-1", "b-1"]
    assert names("set/x/A.png", "set/y/a.png") == ["x-A", "y-a"]  # one file on some disks


def test_one_more_pair_moves_at_most_one_other():
    pairs = [Pair(Path(f"{k}.png"), None, (), str(k)) for k in range(200)]
    before, after = choose_validation(pairs[:-1], 50, 0), choose_validation(pairs, 50, 0)
    assert len(before) == len(after) == 50
    assert len(before - after) <= 1
    with pytest.raises(BadArgument):
        choose_validation(pairs, 200, 0)


def test_validation_is_a_function_of_names_and_seed():
    """Two renderings of each background stay together, and it is the same choice in every version."""
    pairs = [Pair(Path(f"{k}_{j}"), Path(f"{k}"), (), f"{k}_{j}") for k in range(6) for j in (1, 2)]
    assert choose_validation(pairs, 5, 0) == choose_validation(pairs[::-1], 5, 0) == {"1_1", "1_2", "2_1", "2_2"}
    assert choose_validation(pairs, 5, 1) == {"0_1", "0_2", "1_1", "1_2"}


def test_rain_side_of_rain_that_is_darker_than_its_background():
    clean, rainy = make_pair(60, 80)
    dimmed = (rainy * 0.8).astype(np.uint8)
    assert dimmed.mean() < clean.mean()
    assert rain_side(clean, dimmed) == 1
    assert rain_side(dimmed, clean) == -1
    assert rain_side(clean, clean) == 0


def test_clean_side_is_a_vote(tmp_path):
    paths = [tmp_path / f"{k}.png" for k in range(9)]
    for k, path in enumerate(paths):
        halves = make_pair(60, 80, seed=k)
        cv2.imwrite(str(path), np.hstack(halves if k < 3 else halves[::-1]))
    assert layouts.find_clean_side(paths) == ("right", False)  # 6 against 3
    assert layouts.find_clean_side(paths[1:]) == ("right", True)
    assert layouts.find_clean_side(paths[:3]) == ("left", True)

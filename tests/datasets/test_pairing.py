"""What becomes a pair, by names and contents; the pairs' names, the validation set, the clean side."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from base.errors import BadArgument
from conftest import make_pair
from datasets import pairing
from datasets.layouts import Found
from datasets.pairing import Pair, choose_validation, make_names_unique, pair_by_name, rain_side


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


def test_likeness_tells_pairs_from_halves_of_a_picture():
    alike = []
    for seed in range(20):
        clean, rainy = make_pair(60, 80, seed)
        assert pairing.likeness(clean, rainy) > pairing.SAME_PICTURE
        assert pairing.likeness(clean, make_pair(60, 80, seed + 1)[1]) < pairing.SAME_PICTURE
        alike.append(pairing.likeness(clean[:, :40], clean[:, 40:]) > pairing.SAME_PICTURE)
    assert sum(alike) <= 2
    assert pairing.likeness(clean, np.zeros_like(clean)) == 1  # a flat image tells nothing


def test_names_come_before_contents(tmp_path):
    """Files with partners by name are not joined, whatever they show; else most of them must show a picture twice."""
    clean, rainy = make_pair(60, 80)
    for name, image in {"single": clean, "joined": np.hstack([clean, rainy]), "odd": rainy[:, 1:]}.items():
        cv2.imwrite(str(tmp_path / f"{name}.png"), image)
    joined, single, odd = (Found(tmp_path / f"{name}.png", (), "") for name in ("joined", "single", "odd"))
    for images, expected in (
        ([joined], True),
        ([single], False),
        ([odd], True),  # nothing tells
        ([odd, single], False),
        ([joined, joined, single], True),
        ([joined, single, single], False),
        ([joined._replace(role="clean"), joined._replace(role="rainy")], False),
        ([joined._replace(role="rainy")], True),
        ([], True),
    ):
        assert pairing.are_joined(images) == expected


def test_names_of_rainds_and_spa_data():
    for stems in (
        ("rain-1", "rd-1", "rd-rain-1", "norain-1"),
        ("001", "001gt"),
        ("norain-1x2", "norain-1"),
        ("1", "1"),
    ):
        assert len({pairing.bare(stem) for stem in stems}) == 1
    assert {pairing.bare(f"pie-{word}-1") for word in ("rain", "rd", "rd-rain", "norain")} == {"pie-1"}
    assert pairing.bare("rainstreak-1") == "rainstreak-1"


def test_clean_side_is_a_vote(tmp_path):
    paths = [tmp_path / f"{k}.png" for k in range(9)]
    for k, path in enumerate(paths):
        halves = make_pair(60, 80, seed=k)
        cv2.imwrite(str(path), np.hstack(halves if k < 3 else halves[::-1]))
    assert pairing.find_clean_side(paths) == ("right", False)  # 6 against 3
    assert pairing.find_clean_side(paths[1:]) == ("right", True)
    assert pairing.find_clean_side(paths[:3]) == ("left", True)


def test_names_of_one_folder_become_unique_by_numbers():
    pairs = [Pair(Path(f"set/{name}"), None, ("set",), Path(name).stem) for name in ("3.jpeg", "3.jpg", "3-2.jpg")]
    make_names_unique(pairs)
    assert [pair.name for pair in pairs] == ["3", "3-2", "3-2-2"]


def test_images_that_differ_only_in_case_or_format_keep_their_partners():
    names = ("A.png", "a.png", "3.jpg", "3.png")
    images = [Found(Path(role) / name, (), role) for role in ("clean", "rainy") for name in names]
    pairs, left_out = pair_by_name(images)
    assert [pair.clean.name for pair in pairs] == [pair.rainy.name for pair in pairs] == list(names)
    assert left_out == []


def test_validation_has_at_least_one_background():
    pairs = [Pair(Path(f"{k}_{j}"), Path(f"{k}"), (), f"{k}_{j}") for k in range(3) for j in range(5 + (k == 0))]
    assert choose_validation(pairs, 2, 0) in ({f"{k}_{j}" for j in range(5)} for k in (1, 2))
    assert choose_validation(pairs, 0, 0) == choose_validation(pairs[:6], 2, 0) == set()


def test_names_that_are_no_utf8_are_chosen_too():
    pairs = [Pair(Path(f"\udcff{k}"), None, (), f"\udcff{k}") for k in range(4)]
    assert len(choose_validation(pairs, 2, 0)) == 2


def test_a_pair_that_is_found_twice_is_taken_once(tmp_path):
    def pair(folder: str, text: str) -> Pair:
        for role in ("clean", "rainy"):
            (tmp_path / folder / role).mkdir(parents=True)
            (tmp_path / folder / role / "1.png").write_text(text)
        return Pair(tmp_path / folder / "rainy/1.png", tmp_path / folder / "clean/1.png", (folder,), "1")

    first, other, copy = pair("a", "x"), pair("b", "y"), pair("c", "x")
    kept, lines = pairing.drop_copies([first, other, copy])
    assert kept == [first, other]
    assert [str(copy.rainy) in line and str(first.rainy) in line for line in lines] == [True]

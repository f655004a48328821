"""What is read from the names of a download's folders and files: the set, the split, the role."""

from pathlib import Path

import pytest

from datasets import layouts
from datasets.layouts import split_of


@pytest.mark.parametrize(
    ("set_name", "folder", "expected"),
    [
        ("rain100h", "Rain100H/train/rain", ("train", 2)),
        ("rain100h", "test/Rain100H/rainy", ("test", 2)),
        ("rain100h", "train/Rain100H/rain", ("train", 2)),
        ("rain100h", "Rain100H", ("test", 2)),
        ("rain100h", "train/RainTrainL", "rain100l"),
        ("rain1200", "DID-MDN-training/Rain_Light/train2018new", ("train", 2)),
        ("rain800", "test_nature", "folder"),
        ("rain800", "test/real", "folder"),
        ("rain800", "pictures", ("", 0)),
        ("rain12", "input", ("test", 0)),
        ("rain100h", "Rain13K/test/Rain100H/input", ("test", 2)),
        ("rain13k", "Rain13K/test/Rain100H/input", "rain100h"),
        ("rain100h", "Rain200H/train/input", "rain200h"),
        ("rain200h", "rain_data_test_Heavy/rain/X2", ("test", 1)),
        ("rain100h", "RainTrain200H", "rain200h"),
        ("rain800", "test/Test100/input", "test100"),
        ("own", "Rain200H/train/input", ("train", 0)),
        ("spa", "Training/real_world", ("train", 2)),
        ("spa", "Testing/real_test_1000/gt", ("test", 2)),
        ("spa", "Testing/Real_Internet", "folder"),
        ("rainds_real", "RainDS/RainDS_real/train_set/rainstreak", ("train", 2)),
        ("rainds_real", "RainDS/RainDS_real/train_set/rainstreak_raindrop", "folder"),
        ("rain100h", "rain_data_train_Heavy/rainstreak", "folder"),
        ("own", "latest/input", ("", 0)),
        ("own", "constrained/input", ("", 0)),
        ("own", "inputTest", ("test", 0)),
        ("rain200h", "Rain200H/rain_data_train_Heavy/norain", ("train", 2)),
        ("rain100h", "Rain200H/rain_data_train_Heavy/norain", "rain200h"),
        ("rain100h", "Rain100H/rain_data_train_Heavy/norain", ("train", 2)),
        ("rain100h", "releases/rain_data_train_Heavy/norain", ("train", 1)),
        ("rain100l", "heavy/train", "rain100h"),
        ("rain1200", "DID-MDN/heavy/train", ("train", 2)),
        ("rain100h", "my_rain100h_subset/part1200px/train", ("train", 2)),
        ("rain1200", "part1200px/train", ("train", 0)),
        ("rain100h", "Rain-100-H/train", ("train", 2)),
        ("own", "RealRain-1k/train/gt", ("train", 0)),
        ("spa", "Training/real_world_rain/001", ("train", 2)),
        *(
            ("own", f"{name}/input", ("", 0))
            for name in ("LightRain", "NightRain", "strain", "contest", "rain_train_test")
        ),
        *(
            ("own", f"LightRain/{name}/input", ("train", 0))
            for name in ("train", "Train", "trainset", "training", "trainA")
        ),
        *(
            ("own", f"{name}/NightRain/input", ("test", 0))
            for name in ("TestA", "test_syn", "Test100", "TESTING", "inTest")
        ),
        *(("own", f"{name}/input", "val") for name in ("val", "Valid", "validation", "val_set", "train/val")),
        ("own", "evaluation/input", ("", 0)),
    ],
)
def test_folder_names_tell_the_split(set_name, folder, expected):
    """Expected are the split and how surely it is of the set; or a word of the reason why the folder is ignored."""
    split, sure, reason = split_of(set_name, Path("/home/download"), Path(folder).parts)
    assert expected in reason if isinstance(expected, str) else (split, sure, reason) == (*expected, "")


def test_the_download_itself_may_be_named_after_a_set():
    assert split_of("rain100h", Path("/home/Rain100H"), ("train",)) == ("train", 2, "")
    assert split_of("rain100l", Path("/home/Rain100H"), ("train",))[2]
    assert split_of("rain100l", Path("/home/Rain100H"), ("Rain100L", "train")) == ("train", 2, "")
    assert split_of("rain100l", Path("/home/Rain100H"), (), "test") == ("test", 0, "")  # as the user says
    assert split_of("rain100h", Path("/home/test"), ("rain",), "train") == ("train", 0, "")
    assert split_of("rain100h", Path("/home/Rain100H"), ("test", "rain"), "train")[2]


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

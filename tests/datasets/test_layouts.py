"""What is read from the names of a download's folders and files: the set, the split, the role."""

from pathlib import Path

import pytest

from datasets import layouts
from datasets.layouts import split_of


@pytest.mark.parametrize(
    ("set_name", "folder", "expected"),
    [
        ("rain100h", "Rain100H/train/rain", ("train", True)),
        ("rain100h", "test/Rain100H/rainy", ("test", True)),
        ("rain100h", "train/Rain100H/rain", ("train", True)),
        ("rain100h", "Rain100H", ("test", True)),
        ("rain100h", "train/RainTrainL", "rain100l"),
        ("rain1200", "DID-MDN-training/Rain_Light/train2018new", ("train", True)),
        ("rain800", "test_nature", "folder"),
        ("rain800", "test/real", "folder"),
        ("rain800", "pictures", ("", False)),
        ("rain12", "input", ("test", False)),
        ("rain100h", "Rain13K/test/Rain100H/input", ("test", True)),
        ("rain13k", "Rain13K/test/Rain100H/input", "rain100h"),
        ("rain100h", "Rain200H/train/input", "rain200h"),
        ("rain200h", "rain_data_test_Heavy/rain/X2", ("test", True)),
        ("rain100h", "RainTrain200H", "rain200h"),
        ("rain800", "test/Test100/input", "test100"),
        ("own", "Rain200H/train/input", ("train", False)),
        ("spa", "Training/real_world", ("train", True)),
        ("spa", "Testing/real_test_1000/gt", ("test", True)),
        ("spa", "Testing/Real_Internet", "folder"),
        ("rainds_real", "RainDS/RainDS_real/train_set/rainstreak", ("train", True)),
        ("rainds_real", "RainDS/RainDS_real/train_set/rainstreak_raindrop", "folder"),
        ("rain100h", "rain_data_train_Heavy/rainstreak", "folder"),
        ("own", "latest/input", ("", False)),
        ("own", "constrained/input", ("", False)),
        ("own", "inputTest", ("test", False)),
    ],
)
def test_folder_names_tell_the_split(set_name, folder, expected):
    """Expected are the split and whether the set is named; or a word of the reason why the folder is ignored."""
    split, named, reason = split_of(set_name, Path("/home/download"), Path(folder).parts)
    assert expected in reason if isinstance(expected, str) else (split, named, reason) == (*expected, "")


def test_the_download_itself_may_be_named_after_a_set():
    assert split_of("rain100h", Path("/home/Rain100H"), ("train",)) == ("train", True, "")
    assert split_of("rain100l", Path("/home/Rain100H"), ("train",))[2]
    assert split_of("rain100l", Path("/home/Rain100H"), ("Rain100L", "train")) == ("train", True, "")
    assert split_of("rain100l", Path("/home/Rain100H"), (), "test") == ("test", False, "")  # as the user says
    assert split_of("rain100h", Path("/home/test"), ("rain",), "train") == ("train", False, "")
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

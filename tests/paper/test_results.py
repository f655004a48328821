"""Result files: collected from what a training and a test leave."""

import json

import pytest

from base.errors import DamagedFile
from paper import results
from paper.rows import Row, find_run
from runs import checkpoints
from runs.checkpoints import Checkpoint
from settings import FIELDS

LINE = "2026 validation at step {}: psnr by stage {} dB (input 20.00), ssim {}, 3.0 s\n"


@pytest.fixture
def run(tmp_path):
    """A run of two stages that was trained and tested on two images, of which one is too small for SSIM."""
    folders = {name: str(tmp_path / name) for name in ("model_dir", "log_dir", "data_dir")}
    run = find_run(Row("sdsen_s2", "rain800", "short"), folders)
    checkpoints.save(run.latest, Checkpoint({}, 2000, run.settings, seconds=12.34, device="a device"))
    run.settings.log_path.mkdir(parents=True)
    (run.settings.log_path / "train.log").write_text(LINE.format(500, "20.00, 21.50", 0.7))
    columns = [
        f"{m}_{place}" for place in ("input", "stage_1", "stage_2") for m in ("psnr", "ssim", "psnr_y", "ssim_y")
    ]
    lines = [["a.png", *range(10, 22)], ["b.png", *(value + 2 if value % 2 == 0 else "nan" for value in range(10, 22))]]
    text = "\n".join(",".join(map(str, line)) for line in [["image", *columns], *lines])
    (run.settings.log_path / "test_best.csv").write_text(text + "\n")
    return run


def test_a_result_has_each_stages_own_scores(run):
    assert results.collect(run)["test"] == {
        "input": {"psnr": 11, "ssim": 11, "psnr_y": 13, "ssim_y": 13},
        "stage_1": {"psnr": 15, "ssim": 15, "psnr_y": 17, "ssim_y": 17},
        "stage_2": {"psnr": 19, "ssim": 19, "psnr_y": 21, "ssim_y": 21},
    }


def test_a_result_says_what_was_trained_and_nothing_of_the_machines_folders(run, tmp_path):
    result = results.collect(run)
    assert (result["preset"], result["data"], result["recipe"], result["seed"]) == ("sdsen_s2", "rain800", "short", 0)
    assert (result["steps"], result["tested"], result["seconds"], result["device"]) == (2000, "best", 12.3, "a device")
    assert (result["test_images"], result["validation"]) == (2, [[500, 21.5, 0.7]])
    assert set(result["settings"]) == set(FIELDS)
    assert result["settings"]["model_dir"] == "model_dir"
    assert str(tmp_path) not in json.dumps(result)


def test_rain_of_the_training_pairs(run, tmp_path):
    assert results.collect(run)["train_rain"] == "as in the data set"
    (tmp_path / "data_dir" / "train").mkdir(parents=True)
    for start in ("drawn", "synthetic rain"):
        text = f"{start}: rain100l, 6 on each of 209 images, seed 0\n"
        (tmp_path / "data_dir" / "train" / "drawn.txt").write_text(text)
        assert results.collect(run)["train_rain"] == "synthetic: rain100l, 6 on each of 209 images, seed 0"
    run = run._replace(settings=find_run(run.row, {**vars(run.settings), "rain": "rain800"}).settings)
    assert results.collect(run)["train_rain"] == "synthetic: rain800"


def test_validation_curve_takes_the_last_of_a_step():
    lines = (500, "20.00, 21.50", 0.7), (1000, "22.25", 0.75), (500, "21.00", 0.71)
    text = "".join(LINE.format(*values) for values in lines)
    assert results.validation_curve(text) == [[500, 21.0, 0.71], [1000, 22.25, 0.75]]


def test_files_of_results(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert results.read_result("a") is None
    results.write_result("b", {"x": 1})
    results.write_result("a", {"x": 2})
    assert list(results.read_results().items()) == [("a", {"x": 2}), ("b", {"x": 1})]
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DamagedFile):
        results.read_result("a")

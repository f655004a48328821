"""Exported weights: small, taken by their name, the mean of several, fewer stages."""

import pytest
import torch

import model
from base.errors import BadArgument, Mismatch, MissingFile, Occupied
from base.files import ROOT
from commands import LONG, SMALL, call, read, read_csv, same_weights
from runs import checkpoints
from runs.checkpoints import Checkpoint
from settings import override, resolve


def test_export_makes_a_file_that_test_and_training_take_by_its_name(places, tmp_path):
    call("-a", "train", *SMALL, *LONG, *places, "--steps", "2", "--average", "0.5", "--run", "mine")
    call("-a", "export", "-m", "mine/latest", *places[:2], "--run", "small", "--data_dir", "")
    assert checkpoints.load(tmp_path / "model_dir" / "small.pth").settings.data_dir == ""
    with pytest.raises(BadArgument):
        call("-a", "export", "-m", "mine/latest", *places[:2], "--lr", 1)
    call("-a", "test", "-m", "mine/latest", *places)
    call("-a", "test", "-m", "small", *places)
    scores = [read_csv(tmp_path / "log_dir" / name) for name in ("mine/test_latest.csv", "test_small.csv")]
    assert scores[0] == scores[1]
    # A new training starts from its weights; of the old one only the network stays.
    call("-a", "train", "-m", "small", "--run", "tuned", *places, *LONG, "--patch_size", 16, "--steps", 1, "--lr", 0)
    tuned = read(tmp_path, "latest", "tuned")
    assert (tuned.step, tuned.settings.average, tuned.settings.channel) == (1, 0.0, 2)
    weights = read(tmp_path, "latest", "mine").average
    assert same_weights(tuned.network, weights)
    with pytest.raises(Occupied):
        call("-a", "export", "-m", "small", *places[:2])


def test_a_run_and_a_file_of_weights_never_share_a_name(places, tmp_path):
    train = ["-a", "train", *SMALL, *LONG, *places, "--run", "mine", "--steps"]
    call(*train, 2)
    call("-a", "export", "-m", "mine", *places[:2])
    assert checkpoints.load(tmp_path / "model_dir" / "mine_step2.pth").step == 2
    with pytest.raises(Occupied):
        call("-a", "export", "-m", "mine", *places[:2], "--run", "mine")
    call(*train, 3)  # resumes
    with pytest.raises(Occupied):  # no weights are replaced
        call("-a", "export", "-m", "mine", *places[:2], "--run", "mine_step2")
    (tmp_path / "model_dir" / "mine_step2.pth").rename(tmp_path / "model_dir" / "mine.pth")
    with pytest.raises(Occupied):
        call(*train, 4)
    assert read(tmp_path, "latest", "mine").step == 3


def test_a_preset_is_its_run_and_never_weights_of_that_name(places, tmp_path):
    call("-a", "train", *SMALL, *LONG, *places, "--run", "mine", "--steps", 1)
    call("-a", "export", "-m", "mine", *places[:2], "--run", "sdsen")
    with pytest.raises(MissingFile):
        call("-a", "test", "-p", "sdsen", *SMALL, *places)


def test_export_of_several_is_their_mean(places, tmp_path):
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 3, "--average", 0.5, "--save_steps", 1, "--run", "mine")
    with pytest.raises(BadArgument):
        call("-a", "export", "-m", "mine/step_1", "mine/step_3", *places[:2])
    call("-a", "export", "-m", *(f"mine/step_{step}" for step in (1, 2, 3)), *places[:2], "--run", "mean")
    weights = [read(tmp_path, f"step_{step}", "mine").average for step in (1, 2, 3)]
    exported = checkpoints.load(tmp_path / "model_dir" / "mean.pth")
    for name, mean in exported.network.items():
        assert (mean - sum(each[name] for each in weights) / 3).abs().max() < 1e-7
    assert any(not torch.equal(mean, weights[1][name]) for name, mean in exported.network.items())
    assert exported.step == 1
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1, "--channel", 4, "--run", "wide")
    with pytest.raises(Mismatch):
        call("-a", "export", "-m", "mine", "wide", *places[:2], "--run", "both")


def test_export_with_fewer_stages(places, tmp_path):
    """The first of them: their scores are the same."""
    call("-a", "train", *SMALL, *LONG, *places, "--stage_num", 3, "--steps", 1, "--run", "mine")
    with pytest.raises(Mismatch):
        call("-a", "export", "-m", "mine", *places[:2], "--run", "more", "--stage_num", 4)
    call("-a", "export", "-m", "mine", *places[:2], "--run", "two", "--stage_num", 2)
    call("-a", "test", "-m", "mine", *places)
    call("-a", "test", "-m", "two", *places)
    whole, two = (read_csv(tmp_path / "log_dir" / name) for name in ("mine/test_best.csv", "test_two.csv"))
    assert [column for column in two[0] if column.startswith("psnr_stage")] == ["psnr_stage_1", "psnr_stage_2"]
    assert [row["psnr_stage_2"] for row in two] == [row["psnr_stage_2"] for row in whole]


def test_export_of_stages_with_weights_of_their_own(places):
    """coarse2fine's outer fusions: the weights of eight stages are not those of two."""
    call("-a", "train", "-p", "coarse2fine", *places, "--steps", 1, "--epochs", 0, "--patch_size", 16, "--run", "c2f")
    with pytest.raises(Mismatch):
        call("-a", "export", "-m", "c2f", *places[:2], "--run", "two", "--stage_num", 2)


def test_the_file_holds_weights_and_settings_alone(tmp_path):
    """No optimizer, no random state, no folder outside the repository."""
    settings = resolve("sdsen_s2", {"channel": 2, "depth": 4, "data_dir": "/elsewhere"})
    settings = override(settings, {"exclude": ("/elsewhere", str(ROOT / "data" / "test"))})
    weights, random = model.build(settings).state_dict(), {"cpu": torch.get_rng_state()}
    average = {name: value + 1 for name, value in weights.items()}
    trained = Checkpoint(weights, 7, settings, {"state": {}}, random, 20.5, average=average, device="cpu")
    checkpoints.save(tmp_path / "run" / "latest.pth", trained)
    call("-a", "export", "-m", "run", "--model_dir", tmp_path, "--run", "small")
    values = torch.load(tmp_path / "small.pth", weights_only=True)
    assert [values[name] for name in ("optimizer", "random", "average", "device")] == [None, None, None, ""]
    assert b"elsewhere" not in (tmp_path / "small.pth").read_bytes()
    exported = checkpoints.load(tmp_path / "small.pth")
    assert (exported.step, exported.settings.run, exported.settings.stage_num) == (7, "small", 2)
    assert (exported.settings.data_dir, exported.settings.exclude) == ("", (str(ROOT / "data" / "test"),))
    assert same_weights(exported.network, average)
    torch.save({"net": weights, "clock": 1}, tmp_path / "published")
    with pytest.raises(Mismatch):
        call("-a", "export", "-m", "published", "--model_dir", tmp_path, "--run", "x")

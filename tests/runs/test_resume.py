"""A resumed training is the unbroken one, bit for bit; what a training may start from."""

import shutil

import cv2
import pytest
import torch

import model
from base.errors import Mismatch
from commands import LONG, OTHERS, SMALL, TINY, call, files, read, same_state, scalars
from conftest import make_pair
from runs import checkpoints, training
from runs.checkpoints import choose_start
from runs.restore import open_network
from settings import resolve


@pytest.mark.parametrize("optimizer", ["adam", "soap"])
def test_two_steps_and_two_resumed_are_four_unbroken(places, tmp_path, optimizer):
    words = ["-a", "train", *SMALL, *LONG, *places, "--milestones", 3, "--optimizer", optimizer]
    call(*words, "--run", "broken", "--steps", 2)
    call("-a", "train", *places, "--run", "broken", "--steps", 4)  # what the checkpoint knows need not be said again
    call(*words, "--run", "unbroken", "--steps", 4)
    assert same_state(read(tmp_path, "latest", "broken"), read(tmp_path, "latest", "unbroken"))
    assert not same_state(read(tmp_path, "latest", "broken"), read(tmp_path, "step_2", "unbroken"))
    groups = read(tmp_path, "latest", "broken").optimizer["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-4] * len(groups))  # SOAP has two


def test_synthetic_rain_resumes_too(places, tmp_path):
    words = ["-a", "train", *SMALL, *LONG, *places, "--rain", "rain100h", "--clean_dir", clean_images(tmp_path)]
    call(*words, "--run", "broken", "--steps", 2)
    call("-a", "train", *places, "--run", "broken", "--steps", 4)
    call(*words, "--run", "unbroken", "--steps", 4)
    call("-a", "train", *SMALL, *LONG, *places, "--run", "stored", "--steps", 4)
    assert same_state(read(tmp_path, "latest", "broken"), read(tmp_path, "latest", "unbroken"))
    assert not same_state(read(tmp_path, "latest", "broken"), read(tmp_path, "latest", "stored"))


def test_changes_since_the_checkpoint_are_listed(places, tmp_path):
    clean_dir = clean_images(tmp_path)
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    overrides = {"model_dir": str(tmp_path / "model_dir"), "rain": "rain800", "clean_dir": str(clean_dir)}
    start = choose_start(None, None, overrides)
    assert [change.split()[0] for change in start.changes] == ["rain", "clean_dir"]
    assert (start.settings.rain, start.settings.clean_dir, start.checkpoint.step) == ("rain800", str(clean_dir), 1)
    call("-a", "train", *places, "--rain", "rain800", "--clean_dir", clean_dir, "--steps", 2)
    assert read(tmp_path, "latest").settings.clean_dir == str(clean_dir)


def test_a_resume_restores_random_state_best_score_and_seconds(places, tmp_path, monkeypatch):
    """The best score is kept, as the next validation is worse."""
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    state, generator = read(tmp_path, "latest"), torch.Generator().manual_seed(12345)
    state.random["cpu"], state.best_psnr, state.seconds = generator.get_state(), 50.0, 1000.0
    checkpoints.save(tmp_path / "model_dir" / "sdsen" / "latest.pth", state)
    validate, numbers = training.validate, []

    def validate_and_draw(*arguments):
        numbers.append(torch.rand(1).item())
        return validate(*arguments)

    monkeypatch.setattr(training, "validate", validate_and_draw)
    call("-a", "train", *places, "--steps", 2)
    assert numbers == [torch.rand(1, generator=generator).item()]
    resumed = read(tmp_path, "latest")
    assert torch.equal(resumed.random["cpu"], generator.get_state())
    assert resumed.best_psnr == 50
    assert 1000 < resumed.seconds < 1500
    assert read(tmp_path, "best").step == 1


def test_other_validation_pairs_or_another_run_start_the_search_for_the_best_anew(places, tmp_path):
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    folders = {"model_dir": str(tmp_path / "model_dir")}
    assert choose_start(None, None, folders).checkpoint.best_psnr == read(tmp_path, "latest").best_psnr
    assert choose_start(None, None, {**folders, "val_images": 1}).checkpoint.best_psnr is None
    assert choose_start(None, None, {**folders, "data_dir": "elsewhere"}).checkpoint.best_psnr is None
    assert choose_start(None, "sdsen", {**folders, "run": "other"}).checkpoint.best_psnr is None


def clean_images(tmp_path):
    folder = tmp_path / "clean"
    folder.mkdir()
    for index in range(2):
        cv2.imwrite(str(folder / f"{index}.jpg"), make_pair(30, 40, index)[0])
    return folder


@pytest.mark.parametrize(("name", "labels"), [("coarse2fine", False), ("php", False), ("php", True)])
def test_other_networks_resume_bit_for_bit(places, tmp_path, label_dir, name, labels):
    """With Adam's moments, and the segmentation network that is trained along."""
    if not labels:
        shutil.rmtree(label_dir)
    words = ["-a", "train", *OTHERS[name], *TINY, *LONG, *places, "--milestones", 3]
    call(*words, "--run", "broken", "--steps", 2)
    call("-a", "train", *places, "--run", "broken", "--steps", 4)
    call(*words, "--run", "unbroken", "--steps", 4)
    broken, unbroken = (read(tmp_path, "latest", run) for run in ("broken", "unbroken"))
    half = read(tmp_path, "step_2", "unbroken")
    assert same_state(broken, unbroken)
    assert broken.criterion.keys() == unbroken.criterion.keys()
    assert all(torch.equal(weight, unbroken.criterion[key]) for key, weight in broken.criterion.items())
    assert len(unbroken.optimizer["state"]) == len(unbroken.network) + len(unbroken.criterion)
    assert (sum(weight.numel() for weight in broken.criterion.values()) == 96899) == labels
    if labels:
        key = "segmentation.pyramids.stem.0.weight"
        assert not torch.equal(broken.criterion[key], half.criterion[key])
    assert not same_state(half, unbroken)


def test_a_training_with_labels_does_not_resume_without_them(places, tmp_path, label_dir):
    call("-a", "train", *OTHERS["php"], *TINY, *LONG, *places, "--steps", 1)
    before = files(tmp_path / "model_dir")
    shutil.rmtree(label_dir)
    with pytest.raises(Mismatch):
        call("-a", "train", *places, "-p", "php", "--epochs", 0, "--milestones", 3, "--steps", 2)
    assert files(tmp_path / "model_dir") == before
    # A new training starts from the exported weights.
    call("-a", "export", "-m", "php/latest", *places[:2], "--run", "alone")
    alone = checkpoints.load(tmp_path / "model_dir" / "alone.pth")
    assert (alone.criterion, alone.optimizer, alone.settings.network) == (None, None, "php")
    call("-a", "train", "-m", "alone", *OTHERS["php"], *TINY, *LONG, *places, "--steps", 1, "--lr", 0, "--run", "again")
    again = read(tmp_path, "latest", "again")
    assert all(torch.equal(again.network[key], weight) for key, weight in alone.network.items())


def test_run_with_averaged_weights_resumes_and_they_are_tested(places, tmp_path):
    words = ["-a", "train", *SMALL, *LONG, *places, "--stage_num", 4, "--average", 0.5, "--val_images", 0]
    call(*words, "--run", "broken", "--steps", 2)
    call("-a", "train", *places, "--run", "broken", "--steps", 4)
    call(*words, "--run", "unbroken", "--steps", 4)
    a, b = read(tmp_path, "latest", "broken"), read(tmp_path, "latest", "unbroken")
    assert same_state(a, b)
    assert all(torch.equal(a.average[name], b.average[name]) for name in a.average)
    assert any(not torch.equal(a.average[name], a.network[name]) for name in a.average)
    opened, settings, *_ = open_network(None, "unbroken/latest", {"model_dir": str(tmp_path / "model_dir")})
    assert settings.stage_num == opened.stage_num == 4
    assert all(torch.equal(tensor, b.average[name]) for name, tensor in opened.state_dict().items())


def test_a_training_of_a_gpu_resumes_here(places, tmp_path):
    """A CUDA GPU's Adam is fused, which the checkpoint's state of the optimiser says."""
    words = ["-a", "train", *SMALL, *LONG, *places]
    call(*words, "--run", "unbroken", "--steps", 4)
    call(*words, "--run", "broken", "--steps", 2)
    state = read(tmp_path, "latest", "broken")
    state.optimizer["param_groups"][0]["fused"] = True
    for moments in state.optimizer["state"].values():
        moments["step"] = torch.tensor(float(moments["step"]))
    checkpoints.save(tmp_path / "model_dir" / "broken" / "latest.pth", state)
    call("-a", "train", *places, "--run", "broken", "--steps", 4)
    assert same_state(read(tmp_path, "latest", "broken"), read(tmp_path, "latest", "unbroken"))
    assert not read(tmp_path, "latest", "broken").optimizer["param_groups"][0]["fused"]


def test_a_published_checkpoint_resumes(places, tmp_path):
    network = model.build(resolve("sdsen", {"channel": 2, "depth": 4}))
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.rand(1, 3, 8, 8), 1)[0].sum().backward()
    optimizer.step()
    published = tmp_path / "latest"
    torch.save({"net": network.state_dict(), "clock": 1234, "opt": optimizer.state_dict()}, published)
    call("-a", "train", "-m", published, *SMALL, *LONG, *places, "--steps", 1236, "--milestones", 1235)
    curves = scalars(tmp_path / "log_dir" / "sdsen")
    assert [(step, round(value, 7)) for step, value in curves["train/lr"]] == [(1235, 1e-3), (1236, 1e-4)]
    assert read(tmp_path, "latest").step == 1236
    assert read(tmp_path, "latest").optimizer["state"][0]["step"] == 3


def test_a_run_of_one_epoch_ends_after_it_and_resumes_for_more(places, tmp_path):
    """Five images, two a step."""
    words = ["-a", "train", "-p", "php_acc", *TINY, *LONG, *places, "--milestones", 1]
    call(*words, "--epochs", 1)
    first = read(tmp_path, "latest", "php_acc")
    assert (first.step, first.settings.epochs, first.settings.milestones) == (3, 1, (1,))
    call("-a", "train", "-p", "php_acc", *places, "--epochs", 1, "--milestones", 1)
    assert same_state(read(tmp_path, "latest", "php_acc"), first)
    call("-a", "train", "-p", "php_acc", *places, "--epochs", 2, "--milestones", 1)
    assert read(tmp_path, "latest", "php_acc").step == 6
    rates = [value for _, value in scalars(tmp_path / "log_dir" / "php_acc")["train/lr"]]
    assert rates == pytest.approx([1e-3] * 3 + [1e-4] * 3)


def test_training_from_another_runs_weights_needs_a_run_of_its_own(places, tmp_path):
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    call("-a", "train", *places, "-m", "sdsen/step_1", "--run", "second", "--steps", 2)
    assert read(tmp_path, "latest", "second").step == 2
    assert read(tmp_path, "latest").step == 1


def test_a_run_that_is_named_as_checkpoint_resumes_in_its_place(places, tmp_path):
    call("-a", "train", *SMALL, *LONG, *places, "--run", "mine", "--steps", 1)
    call("-a", "train", *places, "-m", "mine", "--steps", 2)
    call("-a", "train", *places, "-m", "mine/latest", "--steps", 3)
    assert read(tmp_path, "latest", "mine").step == 3
    assert not (tmp_path / "model_dir" / "sdsen").exists()


def test_stages_are_added_by_stage_num_alone(places, tmp_path):
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    old = read(tmp_path, "latest")
    with pytest.raises(Mismatch, match="stage_num"):
        call("-a", "train", "-p", "sdsen_s4", *SMALL[:-4], *places, "--run", "sdsen", "--steps", 2)
    call("-a", "train", *places, "-m", "sdsen/latest", "--run", "grown", "--stage_num", 4, "--steps", 2)
    new = read(tmp_path, "latest", "grown")
    assert new.settings.stage_num == 4
    assert new.optimizer["state"][0]["step"] == 2
    assert new.best_psnr != old.best_psnr
    assert (tmp_path / "model_dir" / "grown" / "best.pth").is_file()

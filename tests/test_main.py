"""The loops: learning, resuming bit for bit, interruption, scores, and one clear line for bad input."""

import csv
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import cv2
import numpy as np
import pytest
import torch
from tensorboardX.proto.event_pb2 import Event

import fake_graphs
import losses
import main
import show
from base.errors import UserError
from base.files import ROOT
from conftest import make_pair, write_vgg
from dataset import list_pairs
from fake_cuda import keep_on_cpu
from model import DSEN
from presets import PRESETS
from runs import checkpoints
from settings import resolve

SMALL = "--channel 2 --depth 4 --patch_size 16 --batch_size 2 --stage_num 2 --device cpu".split()
LONG = "--log_steps 1 --save_steps 2 --val_images 2 --lr 1e-3".split()


@pytest.fixture
def places(tmp_path, data_dir):
    """The words that send everything to a temporary folder."""
    folders = {name: tmp_path / name for name in ("model_dir", "log_dir", "show_dir")}
    return [word for name, folder in {**folders, "data_dir": data_dir}.items() for word in (f"--{name}", str(folder))]


def call(*words):
    main.main([str(word) for word in words])


def script(*words, **keywords):
    """main.py in a process of its own, from a foreign working directory."""
    command = [sys.executable, str(ROOT / "config" / "main.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120, **keywords)


def read(tmp_path, name, run="sdsen"):
    return checkpoints.load(tmp_path / "model_dir" / run / f"{name}.pth")


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def flat(values, name=""):
    """An optimiser's state, lists in it too, as one level of names and tensors."""
    if isinstance(values, dict | list):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        return {inner: value for key, part in items for inner, value in flat(part, f"{name}/{key}").items()}
    return {name: torch.as_tensor(values)}


def same_state(a, b):
    """Bit for bit: network, optimiser, random state, step."""
    network = all(torch.equal(a.network[name], b.network[name]) for name in b.network)
    first, second = (flat(checkpoint.optimizer["state"]) for checkpoint in (a, b))
    moments = first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    return network and moments and a.step == b.step and torch.equal(a.random["cpu"], b.random["cpu"])


@pytest.mark.parametrize("optimizer", ["adam", "soap"])
def test_two_steps_and_two_resumed_are_four_unbroken(places, tmp_path, optimizer):
    words = ["-a", "train", *SMALL, *LONG, *places, "--milestones", 3, "--optimizer", optimizer]
    call(*words, "--run", "broken", "--steps", 2)
    call("-a", "train", *places, "--run", "broken", "--steps", 4)  # what the checkpoint knows need not be said again
    call(*words, "--run", "unbroken", "--steps", 4)
    assert same_state(read(tmp_path, "latest", "broken"), read(tmp_path, "latest", "unbroken"))
    assert not same_state(read(tmp_path, "latest", "broken"), read(tmp_path, "step_2", "unbroken"))


def test_soap_is_adam_in_turned_coordinates(places, tmp_path):
    """A start from the same weights: its first gradient is only looked at, and a later step goes elsewhere than Adam's.

    What it turns a convolution's gradient by are three orthogonal matrices.
    """
    for optimizer in ("adam", "soap"):
        words = ["--optimizer", optimizer, "--run", optimizer, "--save_steps", 1, "--steps", 3]
        call("-a", "train", *SMALL, *places, *words)
    first, last = (read(tmp_path, f"step_{step}", "soap") for step in (1, 3))
    other = read(tmp_path, "step_3", "adam")
    name = "re_layer.0.weight"
    assert not torch.equal(read(tmp_path, "step_1", "adam").network[name], first.network[name])
    assert not torch.allclose(last.network[name], first.network[name])
    assert not torch.allclose(last.network[name], other.network[name])
    for state in last.optimizer["state"].values():
        for matrix in state["Q"]:
            if len(matrix):
                assert torch.allclose(matrix @ matrix.T, torch.eye(len(matrix)), atol=1e-4)
    with pytest.raises(UserError, match="holds the state of soap, not of adam"):
        main.train(None, "soap", {"optimizer": "adam", "model_dir": str(tmp_path / "model_dir"), "steps": 4})


def test_soap_turns_channels_orientations_and_pixels():
    """A filter (out, in, 4, 5, 5) by matrices of `out`, of `in` with the orientations, and of the pixels."""
    network = DSEN(stage_num=2, link="concat")
    soap = main.make_optimizer(network, 1e-3, "soap")
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    soap.step()
    sides = {name: [len(m) for m in soap.state[parameter]["GG"]] for name, parameter in network.named_parameters()}
    assert sides["pre_layer.conv0.weight"] == [30, 25]
    assert sides["re_layer.0.weight"] == [10, 80, 25]
    assert sides["connect_layers.3.conv0.weight"] == [10, 40, 25]
    assert sides["dec.0.weight"] == [10, 40, 25]
    assert sides["re_layer.0.bias"] == [0]
    assert {name for name, parameter in network.named_parameters()} == sides.keys()


def test_drawn_rain_resumes_too(places, tmp_path):
    words = ["-a", "train", *SMALL, *LONG, *places, "--rain", "rain100h", "--clean_dir", clean_images(tmp_path)]
    call(*words, "--run", "broken", "--steps", 2)
    call("-a", "train", *places, "--run", "broken", "--steps", 4)
    call(*words, "--run", "unbroken", "--steps", 4)
    call("-a", "train", *SMALL, *LONG, *places, "--run", "stored", "--steps", 4)
    assert same_state(read(tmp_path, "latest", "broken"), read(tmp_path, "latest", "unbroken"))
    assert not same_state(read(tmp_path, "latest", "broken"), read(tmp_path, "latest", "stored"))


def test_other_rain_than_in_the_checkpoint_is_told(places, tmp_path, capsys):
    clean_dir = clean_images(tmp_path)
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    call("-a", "train", *places, "--rain", "rain800", "--clean_dir", clean_dir, "--steps", 2)
    out = capsys.readouterr().out
    assert "other than in the checkpoint: rain '' is now 'rain800', " in out
    assert f"clean_dir '' is now '{clean_dir}'" in out
    assert f"2 clean images, rain800 rain drawn on their crops, from {clean_dir}, 2 of them kept in memory" in out
    assert read(tmp_path, "latest").settings.clean_dir == str(clean_dir)


def clean_images(tmp_path):
    folder = tmp_path / "clean"
    folder.mkdir()
    for index in range(2):
        cv2.imwrite(str(folder / f"{index}.jpg"), make_pair(30, 40, index)[0])
    return folder


def test_training_lowers_the_loss(places, tmp_path):
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1, "--run", "a")
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 60, "--save_steps", 60, "--run", "b", "--lr", "1e-2")
    assert read(tmp_path, "best", "b").best_psnr > read(tmp_path, "best", "a").best_psnr + 3


def test_training_in_little_memory_lowers_the_loss(places, tmp_path):
    """In bfloat16, in two parts, with repeated stages."""
    words = "--precision bf16 --checkpoint_activations true --accumulate 2 --lr 1e-2 --steps 60 --save_steps 60".split()
    call("-a", "train", *SMALL, *LONG, *places, *words)
    losses = [loss for _, loss in scalars(tmp_path / "log_dir" / "sdsen")["train/loss"]]
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])


@pytest.mark.parametrize(("setting", "steps_that_pay", "calls"), [("on", 99, 1), ("off", 1, 0), ("auto", 1, 0)])
def test_the_network_is_compiled_where_that_is_asked_for(places, monkeypatch, setting, steps_that_pay, calls):
    """`auto` does so on a GPU alone, even where steps enough are left."""
    compiled = []
    monkeypatch.setattr(main, "COMPILE_STEPS", steps_that_pay)
    monkeypatch.setattr(main.torch, "__version__", "2.5.0")
    monkeypatch.setattr(main.model.DSEN, "compile", lambda network: compiled.append(network.training))
    with torch._dynamo.config.patch(suppress_errors=False):
        call("-a", "train", *SMALL, *LONG, *places, "--steps", 1, "--compile", setting)
    assert compiled == [True] * calls


def test_compiling_with_an_old_pytorch_is_refused(places, monkeypatch):
    monkeypatch.setattr(main.torch, "__version__", "2.4.1")
    with pytest.raises(UserError, match=r"--compile on needs PyTorch 2\.5 or newer, this is 2\.4\.1"):
        call("-a", "train", *SMALL, *LONG, *places, "--steps", 1, "--compile", "on")


def scalars(folder):
    """{tag: [(step, value), ...]} of the TensorBoard events of a run."""
    found = {}
    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_curves_log_and_files(places, tmp_path):
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 4, "--milestones", 2)
    curves = scalars(tmp_path / "log_dir" / "sdsen")
    for split, steps in (("train", [1, 2, 3, 4]), ("val", [2, 4])):
        for stage in (1, 2):
            for metric in ("loss", "psnr", "ssim"):
                points = curves[f"{split}/stage_{stage}/{metric}"]
                assert [step for step, _ in points] == steps
                assert np.isfinite([value for _, value in points]).all()
    assert [value for _, value in curves["train/lr"]] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
    assert min(value for _, value in curves["train/images_per_second"]) > 0
    for loss, first, second in zip(*(curves[f"train/{n}"] for n in ("loss", "stage_1/loss", "stage_2/loss")), strict=1):
        assert loss[1] == pytest.approx(first[1] + second[1], rel=1e-5)
    assert [step for step, _ in curves["val/preview"]] == [2, 4]
    preview = cv2.imread(str(tmp_path / "log_dir" / "sdsen" / "preview.png"))
    assert preview.shape == (40, 4 * 48, 3)  # O, two stages, B
    assert (preview[:, -48:] == cv2.imread(str(tmp_path / "data" / "val" / "0.png"))[:, :48]).all()
    log = (tmp_path / "log_dir" / "sdsen" / "train.log").read_text()
    assert "validation on 2 of the 3 whole pairs" in log or "step 4/4" in log
    names = {path.stem for path in (tmp_path / "model_dir" / "sdsen").iterdir()}
    assert names == {"latest", "best", "step_2", "step_4"}


def test_the_best_checkpoint_is_written_before_the_state_that_knows_its_score(places, monkeypatch):
    saved = []
    monkeypatch.setattr(checkpoints, "save", lambda path, state: saved.append(path.stem))
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    assert saved == ["best", "latest", "step_1"]


def test_validation_scores_are_those_of_test(places, tmp_path, capsys):
    """The same images through validation and `-a test` have the same score."""
    shutil.rmtree(tmp_path / "data" / "test")
    shutil.copytree(tmp_path / "data" / "val", tmp_path / "data" / "test")
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 2, "--val_images", 0)
    call("-a", "test", *places, "-m", "sdsen/latest")
    rows = read_csv(tmp_path / "log_dir" / "sdsen" / "test_latest.csv")
    curves = scalars(tmp_path / "log_dir" / "sdsen")
    assert [row["image"] for row in rows] == ["0.png", "1.png", "2.png"]
    for stage in (1, 2):
        for metric in ("psnr", "ssim"):
            mean = np.mean([float(row[f"{metric}_stage_{stage}"]) for row in rows])
            assert curves[f"val/stage_{stage}/{metric}"][-1][1] == pytest.approx(mean, abs=1e-4)
    assert "stage_2" in capsys.readouterr().out


def test_test_scores_the_image_that_would_be_saved(places, tmp_path):
    """A network that predicts no rain: the output is the input, its scores are the input's, and a warning says so."""
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    state = read(tmp_path, "latest")
    state.network["dec.3.weight"].zero_()
    state.network["dec.3.bias"].zero_()
    checkpoints.save(tmp_path / "model_dir" / "nothing.pth", state)
    result = script("-a", "test", *places, "-m", "nothing")
    assert result.returncode == 0, result.stderr
    assert "warning: the output is nearly the input" in result.stdout
    joined = cv2.imread(str(tmp_path / "data" / "test" / "1.png")).astype(float)
    psnr = 10 * np.log10(255**2 / np.mean((joined[:, :48] - joined[:, 48:]) ** 2))
    row = read_csv(tmp_path / "log_dir" / "test_nothing.csv")[1]
    assert float(row["psnr_input"]) == pytest.approx(psnr, abs=1e-4)
    assert float(row["psnr_stage_2"]) == float(row["psnr_input"])


def test_models_lists_every_preset(capsys):
    call("-a", "models")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(PRESETS)
    assert "130998" in next(line for line in lines if line.startswith("sdsen "))


def test_published_checkpoint_goes_on(places, tmp_path):
    network = main.model.build(resolve("sdsen", {"channel": 2, "depth": 4}))
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


def test_export_makes_a_file_that_test_and_training_take_by_its_name(places, tmp_path, capsys):
    call("-a", "train", *SMALL, *LONG, *places, "--steps", "2", "--average", "0.5", "--run", "mine")
    call("-a", "export", "-m", "mine/latest", *places[:2], "--run", "small", "--data_dir", "")
    assert checkpoints.load(tmp_path / "model_dir" / "small.pth").settings.data_dir == ""
    with pytest.raises(UserError, match="not --lr"):
        call("-a", "export", "-m", "mine/latest", *places[:2], "--lr", 1)
    data = (tmp_path / "model_dir" / "small.pth").read_bytes()
    assert f"{hashlib.sha256(data).hexdigest()}  small.pth" in capsys.readouterr().out
    call("-a", "test", "-m", "mine/latest", *places)
    call("-a", "test", "-m", "small", *places)
    scores = [read_csv(tmp_path / "log_dir" / name) for name in ("mine/test_latest.csv", "test_small.csv")]
    assert scores[0] == scores[1]
    # Its weights alone begin another training: of the old one only the network stays.
    call("-a", "train", "-m", "small", "--run", "tuned", *places, *LONG, "--patch_size", 16, "--steps", 1, "--lr", 0)
    tuned = read(tmp_path, "latest", "tuned")
    assert (tuned.step, tuned.settings.average, tuned.settings.channel) == (1, 0.0, 2)
    weights = read(tmp_path, "latest", "mine").average
    assert all(torch.equal(tuned.network[name], weights[name]) for name in weights)
    with pytest.raises(UserError, match="is there already"):
        call("-a", "export", "-m", "small", *places[:2])


def test_export_of_several_is_their_mean(places, tmp_path):
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 3, "--average", 0.5, "--save_steps", 1, "--run", "mine")
    with pytest.raises(UserError, match="needs a name"):
        call("-a", "export", "-m", "mine/step_1", "mine/step_3", *places[:2])
    call("-a", "export", "-m", "mine/step_1", "mine/step_3", *places[:2], "--run", "mean")
    first, last = (read(tmp_path, f"step_{step}", "mine").average for step in (1, 3))
    mean = checkpoints.load(tmp_path / "model_dir" / "mean.pth").network
    assert all((mean[name] - (first[name] + last[name]) / 2).abs().max() < 1e-7 for name in mean)
    assert any(not torch.equal(mean[name], last[name]) for name in mean)
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1, "--channel", 4, "--run", "wide")
    with pytest.raises(UserError, match="two architectures"):
        call("-a", "export", "-m", "mine", "wide", *places[:2], "--run", "both")


def test_export_with_fewer_stages(places, tmp_path):
    """The first of them: their scores are the same."""
    call("-a", "train", *SMALL, *LONG, *places, "--stage_num", 3, "--steps", 1, "--run", "mine")
    with pytest.raises(UserError, match="trained with 3 stages"):
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
    with pytest.raises(UserError, match="c2f"):
        call("-a", "export", "-m", "c2f", *places[:2], "--run", "two", "--stage_num", 2)


def test_a_training_of_a_gpu_goes_on_here(places, tmp_path):
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


def test_losses():
    O, B = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    R = O - B
    for name, loss in losses.STAGE_LOSSES.items():
        least = losses.CHARBONNIER if name == "charbonnier" else 0
        assert loss(R, O, B).item() == pytest.approx(least, abs=1e-5), name
        assert loss(torch.zeros_like(R), O, B) > 0.01, name
    assert losses.STAGE_LOSSES["mse"](torch.zeros_like(R), O, B) == pytest.approx(((O - B) ** 2).mean().item())


def test_clip_norm_bounds_the_step():
    """Without momentum and with learning rate 1, the step is the gradient."""
    O, B = torch.rand(2, 3, 16, 16), torch.zeros(2, 3, 16, 16)
    lengths = {}
    for clip_norm in (0.0, 1e-3):
        settings = resolve("dsen", {"channel": 2, "depth": 4, "clip_norm": clip_norm})
        torch.manual_seed(0)
        network = main.model.build(settings)
        before = torch.nn.utils.parameters_to_vector(network.parameters())
        main.train_step(network, torch.optim.SGD(network.parameters(), lr=1.0), O, B, settings, False)
        after = torch.nn.utils.parameters_to_vector(network.parameters())
        lengths[clip_norm] = (after - before).norm().item()
    assert lengths[0.0] > 0.01
    assert lengths[1e-3] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("loss", losses.STAGE_LOSSES)
def test_crops_in_pieces_give_the_whole_batchs_gradients(loss, monkeypatch):
    O, B = torch.rand(2, 5, 3, 16, 16)
    settings = resolve("sdsen_s2", {"channel": 2, "depth": 4, "loss": loss})
    found = []
    for pixels in (10**6, 2 * 16 * 16, 1):  # all crops at once, two at a time with one left over, one at a time
        monkeypatch.setattr(main, "PIECE_PIXELS", pixels)
        torch.manual_seed(0)
        network = main.model.build(settings)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
        result = main.train_step(network, optimizer, O, B, settings, True)
        found.append((result, torch.cat([p.grad.flatten() for p in network.parameters()])))
    whole, gradient = found[0]
    assert set(whole) == {"loss", *(f"stage_{t}/{name}" for t in (1, 2) for name in ("loss", "psnr", "ssim"))}
    for result, other in found[1:]:
        assert result == pytest.approx(whole, rel=1e-5)
        assert (other - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize(("accumulate", "parts"), [(1, [5]), (2, [3, 2]), (3, [2, 2, 1]), (9, [1] * 5)])
def test_accumulated_parts_give_the_whole_batchs_gradients(accumulate, parts, monkeypatch):
    monkeypatch.setattr(main, "PIECE_PIXELS", 10**6)
    O, B = torch.rand(2, 5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = resolve("sdsen_s2", {"channel": 2, "depth": 4, "accumulate": accumulate})
    torch.manual_seed(0)
    network, seen = main.model.build(settings), []
    loss = sum(losses.STAGE_LOSSES["mse"](R, O, B) for R in network(O))
    wanted = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(network.parameters()))])
    network.register_forward_hook(lambda network, inputs, _: seen.append(len(inputs[0])))
    result = main.train_step(network, torch.optim.SGD(network.parameters(), lr=0.0), O, B, settings, False)
    assert seen == parts
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-5)
    gradient = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    assert (gradient - wanted).norm() < 1e-5 * wanted.norm()


def test_a_loss_that_is_not_finite_in_one_piece_changes_nothing(monkeypatch):
    monkeypatch.setattr(main, "PIECE_PIXELS", 1)
    settings = resolve("dsen", {"channel": 2, "depth": 4})
    network = main.model.build(settings)
    before = torch.nn.utils.parameters_to_vector(network.parameters()).clone()
    O, B = torch.rand(2, 3, 3, 16, 16)
    O[1] = float("nan")
    result = main.train_step(network, torch.optim.SGD(network.parameters(), lr=1.0), O, B, settings, False)
    assert np.isnan(result["loss"])
    assert torch.equal(torch.nn.utils.parameters_to_vector(network.parameters()), before)


def test_learning_rate():
    settings = resolve()
    rates = [main.learning_rate(settings, step) for step in (0, 14999, 15000, 17499, 17500, 19999)]
    assert rates == pytest.approx([5e-4, 5e-4, 5e-5, 5e-5, 5e-6, 5e-6])


def test_learning_rate_by_cosine_and_with_warmup():
    settings = resolve("sdsen", {"schedule": "cosine", "steps": 1000, "lr": 1.0})
    rates = [main.learning_rate(settings, step) for step in (0, 250, 500, 1000)]
    assert rates == pytest.approx([1.0, 0.505 + 0.495 * np.sqrt(0.5), 0.505, 0.01])
    settings = resolve("sdsen", {"warmup": 9, "lr": 1.0})
    assert [main.learning_rate(settings, step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])


def test_the_last_stage_alone_is_trained():
    settings = resolve("sdsen_s2", {"channel": 2, "depth": 4, "loss_stages": "last"})
    torch.manual_seed(0)
    network = main.model.build(settings)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    result = main.train_step(network, optimizer, *torch.rand(2, 2, 3, 16, 16), settings, True)
    assert result["loss"] == pytest.approx(result["stage_2/loss"], rel=1e-6)


def test_charbonnier_is_absolute_far_from_zero_and_smooth_at_it():
    zero = torch.zeros(1, 3, 4, 4, requires_grad=True)
    losses.STAGE_LOSSES["charbonnier"](zero, zero.detach(), zero.detach()).backward()
    assert torch.equal(zero.grad, torch.zeros_like(zero))
    far = losses.STAGE_LOSSES["charbonnier"](torch.full((1, 3, 4, 4), 0.5), *torch.zeros(2, 1, 3, 4, 4))
    assert far.item() == pytest.approx(0.5, abs=1e-5)


def test_run_with_averaged_weights_resumes_and_they_are_tested(places, tmp_path):
    words = ["-a", "train", *SMALL, *LONG, *places, "--stage_num", 4, "--average", 0.5, "--val_images", 0]
    call(*words, "--run", "broken", "--steps", 2)
    call("-a", "train", *places, "--run", "broken", "--steps", 4)
    call(*words, "--run", "unbroken", "--steps", 4)
    a, b = read(tmp_path, "latest", "broken"), read(tmp_path, "latest", "unbroken")
    assert same_state(a, b)
    assert all(torch.equal(a.average[name], b.average[name]) for name in a.average)
    assert any(not torch.equal(a.average[name], a.network[name]) for name in a.average)
    opened, settings, *_ = main.open_network(None, "unbroken/latest", {"model_dir": str(tmp_path / "model_dir")})
    assert settings.stage_num == opened.stage_num == 4
    assert all(torch.equal(tensor, b.average[name]) for name, tensor in opened.state_dict().items())


def test_average_is_the_moving_one(places, tmp_path):
    """After three steps w1, w2, w3 with decay 0.75: the first step's weights, then a quarter of each new one's."""
    words = ["-a", "train", *SMALL, *LONG, *places, "--average", 0.75, "--save_steps", 1]
    call(*words, "--steps", 3)
    w1, w2, w3 = (read(tmp_path, f"step_{step}").network["dec.3.weight"] for step in (1, 2, 3))
    expected = 0.75 * (0.75 * w1 + 0.25 * w2) + 0.25 * w3
    assert (read(tmp_path, "latest").average["dec.3.weight"] - expected).abs().max() < 1e-7


# ---------------------------------------------------------------- the other networks

OTHERS = {
    "coarse2fine": "-p coarse2fine --stage_num 2 --depth 2 --channel 4".split(),
    "php": "-p php --epochs 0 --milestones 3".split(),
}
TINY = "--patch_size 16 --batch_size 2 --device cpu".split()


@pytest.fixture(autouse=True)
def no_vgg(tmp_path, monkeypatch):
    """No weights in torchvision's cache."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture
def label_dir(data_dir):
    """Labels of all training pairs: the clean image's dark, middle and bright pixels, of which the latter have none."""
    folder = data_dir / "train" / "label"
    folder.mkdir()
    for path in list_pairs(data_dir / "train"):
        level = cv2.imread(str(path))[:, :48, 0]
        cv2.imwrite(str(folder / path.name), np.select([level < 80, level < 140], [0, 18], 255).astype(np.uint8))
    return folder


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_train_and_test_and_show(places, tmp_path, name):
    call("-a", "train", *OTHERS[name], *TINY, *LONG, *places, "--steps", 2)
    call("-a", "test", *places, "-m", name)
    rows = read_csv(tmp_path / "log_dir" / name / "test_best.csv")
    outputs = {"coarse2fine": 3, "php": 2}[name]
    columns = [column for column in rows[0] if column.startswith("psnr_stage")]
    assert columns == [f"psnr_stage_{t}" for t in range(1, outputs + 1)]
    assert show.main(["-m", name, "--all-stages", *places]) == 0
    for row in rows:
        truth = cv2.imread(str(tmp_path / "data" / "test" / row["image"]))[:, :48].astype(float)
        stem = row["image"].removesuffix(".png")
        for t in range(1, outputs + 1):
            shown = cv2.imread(str(tmp_path / "show_dir" / name / f"{stem}_stage{t}.png"))
            psnr = 10 * np.log10(255**2 / np.mean((shown - truth) ** 2))
            assert float(row[f"psnr_stage_{t}"]) == pytest.approx(psnr, abs=1e-4)
    curves = scalars(tmp_path / "log_dir" / name)
    assert [value for _, value in curves["train/lr"]] == pytest.approx([1e-3, 1e-3])
    assert f"val/stage_{outputs}/ssim" in curves
    assert f"val/stage_{outputs + 1}/ssim" not in curves


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


def test_a_training_with_labels_does_not_go_on_without_them(places, tmp_path, label_dir):
    call("-a", "train", *OTHERS["php"], *TINY, *LONG, *places, "--steps", 1)
    before = files(tmp_path / "model_dir")
    shutil.rmtree(label_dir)
    with pytest.raises(UserError, match="was trained with labels, which is another loss"):
        call("-a", "train", *places, "-p", "php", "--epochs", 0, "--milestones", 3, "--steps", 2)
    assert files(tmp_path / "model_dir") == before
    # Its weights alone are enough to begin another one.
    call("-a", "export", "-m", "php/latest", *places[:2], "--run", "alone")
    alone = checkpoints.load(tmp_path / "model_dir" / "alone.pth")
    assert (alone.criterion, alone.optimizer, alone.settings.network) == (None, None, "php")
    call("-a", "train", "-m", "alone", *OTHERS["php"], *TINY, *LONG, *places, "--steps", 1, "--lr", 0, "--run", "again")
    again = read(tmp_path, "latest", "again")
    assert all(torch.equal(again.network[key], weight) for key, weight in alone.network.items())


def test_terms_of_the_loss_are_curves(places, tmp_path, label_dir):
    vgg = tmp_path / "vgg.pth"
    write_vgg(vgg)
    call("-a", "train", *OTHERS["php"], *TINY, *LONG, *places, "--steps", 3)
    call("-a", "train", *OTHERS["coarse2fine"], *TINY, *LONG, *places, "--steps", 3, "--vgg_weights", vgg)
    stages = [f"stage_{t}/{metric}" for t in (1, 2, 3) for metric in ("loss", "psnr", "ssim")]
    always = {"loss", "lr", "images_per_second", "wait_share"}
    for name, terms, factors in (
        ("php", {"colour", "segmentation", *stages[:6]}, {"colour": 0.1, "segmentation": 0.05}),
        ("coarse2fine", {"l1", "vgg", *stages}, {}),
    ):
        curves = scalars(tmp_path / "log_dir" / name)
        train = {tag.removeprefix("train/"): points for tag, points in curves.items() if tag.startswith("train/")}
        assert train.keys() == always | terms
        summed = {term: 1 for term in terms if term.endswith("/loss")} | factors
        for index in range(3):
            assert [points[index][0] for points in train.values()] == [index + 1] * len(train)
            parts = sum(factor * train[term][index][1] for term, factor in summed.items())
            assert train["loss"][index][1] == pytest.approx(parts, rel=1e-5)
            assert min(train[term][index][1] for term in terms) > 0
    train = {key: train[key][0][1] for key in ("l1", "vgg", "stage_3/loss")}
    assert train["l1"] + train["vgg"] == pytest.approx(train["stage_3/loss"], rel=1e-5)
    assert read(tmp_path, "latest", "coarse2fine").criterion == {}  # VGG's are in their own file


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_first_step_in_bf16(places, tmp_path, label_dir, name):
    first = {}
    for run, words in (
        ("float32", ["--precision", "float32"]),
        ("bf16", ["--precision", "bf16", "--checkpoint_activations", "true", "--accumulate", 2]),
    ):
        call("-a", "train", *OTHERS[name], *TINY, *LONG, *places, *words, "--steps", 1, "--run", run)
        first[run] = {tag: points[0][1] for tag, points in scalars(tmp_path / "log_dir" / run).items()}
    terms = {"loss", *(["colour", "segmentation"] if name == "php" else ["l1"]), "stage_1/loss", "stage_2/loss"}
    found, wanted = ({term: values[f"train/{term}"] for term in terms} for values in (first["bf16"], first["float32"]))
    # Parts of a batch have their own mean over the pixels that have labels.
    assert found.pop("segmentation", 0) == pytest.approx(wanted.pop("segmentation", 0), rel=0.2)
    assert found == pytest.approx(wanted, rel=0.01)
    assert found["loss"] != wanted["loss"]


def test_epochs_are_counted_in_steps():
    settings = resolve("php", {"batch_size": 4, "epochs": 3, "milestones": (1, 2), "steps": 77})
    found = main.in_steps(settings, 10)
    assert (found.epochs, found.steps, found.milestones) == (0, 9, (3, 6))
    assert main.in_steps(settings, 12).steps == 9
    assert main.in_steps(settings, 13).steps == 12
    in_steps = resolve("sdsen", {"steps": 77})
    assert main.in_steps(in_steps, 10) == in_steps


def test_a_run_of_one_epoch_ends_behind_it_and_goes_on_for_more(places, tmp_path, capsys):
    """Five images, two a step."""
    words = ["-a", "train", "-p", "php_acc", *TINY, *LONG, *places, "--milestones", 1]
    call(*words, "--epochs", 1)
    first = read(tmp_path, "latest", "php_acc")
    assert (first.step, first.settings.epochs, first.settings.milestones) == (3, 1, (1,))
    capsys.readouterr()
    call("-a", "train", "-p", "php_acc", *places, "--epochs", 1, "--milestones", 1)
    assert "run php_acc has had its 3 steps; more with --epochs" in capsys.readouterr().out
    assert same_state(read(tmp_path, "latest", "php_acc"), first)
    call("-a", "train", "-p", "php_acc", *places, "--epochs", 2, "--milestones", 1)
    assert read(tmp_path, "latest", "php_acc").step == 6
    rates = [value for _, value in scalars(tmp_path / "log_dir" / "php_acc")["train/lr"]]
    assert rates == pytest.approx([1e-3] * 3 + [1e-4] * 3)


@pytest.mark.parametrize("name", OTHERS)
def test_accumulated_parts_of_other_networks_give_the_whole_batchs_gradients(name, monkeypatch):
    monkeypatch.setattr(main, "PIECE_PIXELS", 10**6)
    O, B = torch.rand(2, 5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found, seen = [], []
    for accumulate in (1, 2):
        torch.manual_seed(0)
        values = {"stage_num": 2, "depth": 2, "channel": 4} if name == "coarse2fine" else {}
        settings = resolve(name, {**values, "accumulate": accumulate})
        network = main.model.build(settings)
        network.register_forward_hook(lambda network, inputs, _: seen.append(len(inputs[0])))
        result = main.train_step(network, torch.optim.SGD(network.parameters(), lr=0.0), O, B, settings, True)
        found.append((result, torch.cat([parameter.grad.flatten() for parameter in network.parameters()])))
    (whole, gradient), (parts, other) = found
    assert seen == [5, 3, 2]
    assert ("colour" if name == "php" else "l1") in whole
    assert parts == pytest.approx(whole, rel=1e-5)
    assert (other - gradient).norm() < 1e-5 * gradient.norm()


def test_clip_norm_bounds_the_network_and_the_segmentation_together():
    settings = resolve("php", {"clip_norm": 1e-3, "segmentation_weight": 5.0})
    torch.manual_seed(0)
    both = torch.nn.ModuleList([main.model.build(settings), losses.build(settings, True)])
    before = torch.nn.utils.parameters_to_vector(both.parameters())
    labels = torch.randint(19, (2, 16, 16))
    optimizer = torch.optim.SGD(both.parameters(), lr=1.0)
    main.train_step(both[0], optimizer, *torch.rand(2, 2, 3, 16, 16), settings, False, both[1], labels)
    step = torch.nn.utils.parameters_to_vector(both.parameters()) - before
    assert step.norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert step[-96899:].norm() > 1e-5  # the segmentation's part


# ---------------------------------------------------------------- on a card


@pytest.mark.filterwarnings("ignore:.*pin_memory")
@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda:1", 1)])
def test_commands_on_a_card(places, tmp_path, cards, monkeypatch, device, index):
    """The cards are fake (fake_cuda.py): PyTorch's calls to them are checked, and the tensors stay on the CPU."""
    cards((8, 0), (8, 0))
    asked = keep_on_cpu(monkeypatch)
    fake_graphs.install(monkeypatch)
    torch.cuda.set_device(0)
    generator = torch.cuda.default_generators[index]
    call("-a", "train", *SMALL[:-2], *LONG, *places, "--group", "z2", "--device", device, "--steps", 1)
    saved = read(tmp_path, "latest")
    assert torch.equal(saved.random["cuda"], generator.get_state())
    assert saved.device == f"Card {index}"
    generator.manual_seed(5)
    call("-a", "train", *places, "--steps", 2)
    assert torch.equal(saved.random["cuda"], generator.get_state())
    call("-a", "test", "-m", "sdsen", *places)
    show.main(["-m", "sdsen", *places])
    assert set(asked) == {torch.device("cuda", index)}


PLANES = "--group z2 --channel 5 --precision float32 --device cuda".split()  # what the CPU's own code doesn't take


@pytest.mark.filterwarnings("ignore:.*pin_memory")
@pytest.mark.parametrize("words", ["--clip_norm 0.01", "--average 0.5 --loss ssim_l1", "--optimizer soap"])
def test_a_training_of_replayed_steps_is_the_training(places, tmp_path, cards, monkeypatch, words):
    """A rehearsal with recorded operations; a run that is interrupted and resumed records anew."""
    cards((8, 0))
    keep_on_cpu(monkeypatch)
    recorder = fake_graphs.install(monkeypatch)
    monkeypatch.setattr(main, "COMPILE_STEPS", 10**6)
    words = [*SMALL[:-2], *LONG, *places, *PLANES, *words.split()]
    call("-a", "train", *words, "--run", "replayed", "--steps", 3)
    call("-a", "train", *words, "--run", "replayed", "--steps", 5)
    replays = [graph.replays for graph in recorder.made]
    assert sum(replays) == 5
    assert len(replays) == 2
    call("-a", "train", *words, "--run", "launched", "--steps", 5, "--cuda_graphs", "off")
    assert len(recorder.made) == len(replays)
    found, wanted = (read(tmp_path, "latest", run) for run in ("replayed", "launched"))
    pairs = zip((found.average or found.network).values(), (wanted.average or wanted.network).values(), strict=True)
    for one, other in pairs:
        assert (one - other).abs().max() < 1e-5
    for name, curve in scalars(tmp_path / "log_dir" / "launched").items():
        if name.startswith("train/stage"):
            replayed = [value for _, value in scalars(tmp_path / "log_dir" / "replayed")[name]]
            assert replayed == pytest.approx([value for _, value in curve], rel=1e-3)


@pytest.mark.filterwarnings("ignore:.*pin_memory")
@pytest.mark.parametrize("words", ["--accumulate 2", "--checkpoint_activations true", "--device cpu"])
def test_steps_that_cannot_be_replayed(places, cards, monkeypatch, words):
    cards((8, 0))
    keep_on_cpu(monkeypatch)
    recorder = fake_graphs.install(monkeypatch)
    words = [*SMALL[:-2], "--stage_num", 3, *LONG, *places, *PLANES, "--steps", 1, *words.split()]
    call("-a", "train", *words)
    assert recorder.made == []
    with pytest.raises(UserError):
        call("-a", "train", *words, "--run", "asked", "--cuda_graphs", "on")


def test_float16_is_not_for_training(places):
    with pytest.raises(UserError):
        call("-a", "train", *SMALL, *places, "--steps", 1, "--precision", "fp16")


def test_float16_is_for_tests(places, tmp_path):
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    scores = {}
    for precision in ("float32", "fp16"):
        call("-a", "test", "-m", "sdsen", *places, "--precision", precision)
        rows = read_csv(tmp_path / "log_dir" / "sdsen" / "test_best.csv")
        scores[precision] = [float(row["psnr_stage_2"]) for row in rows]
    assert scores["fp16"] == pytest.approx(scores["float32"], abs=0.02)


# ---------------------------------------------------------------- interruption


def start_long_run(places, *words):
    words = ["-a", "train", *SMALL, *places, "--steps", 100000, "--log_steps", 1, "--save_steps", 20, *words]
    command = [sys.executable, str(ROOT / "config" / "main.py"), *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(folder, pattern, seconds=60):
    end = time.monotonic() + seconds
    while not any(folder.glob(pattern)):
        assert time.monotonic() < end, f"{folder / pattern} was not written"
        time.sleep(0.05)


WITH_WORKERS = """
import multiprocessing, os, pathlib, sys, time
if __name__ == "__mp_main__":  # a worker, or the fork server, that still imports
    pathlib.Path({folder!r}, f"importing_{{os.getpid()}}").touch()
    time.sleep(0.5)
sys.path.insert(0, {config!r})
import main
from base import console
if __name__ == "__main__":
    {first}
    multiprocessing.set_start_method({method!r})
    console.run_script(main.main)
"""


@contextmanager
def training_with_workers(places, folder, method, *words, first=""):
    """A long run, leader of a process group, with two worker processes that are started by `method`.

    `first` is Python code that runs before it.
    """
    path = folder / "training.py"
    path.write_text(WITH_WORKERS.format(folder=str(folder), config=str(ROOT / "config"), method=method, first=first))
    words = [*SMALL, *places, "--num_workers", 2, "--steps", 10**5, "--save_steps", 20, "--val_images", 1, *words]
    command = [sys.executable, str(path), "-a", "train", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def rest_of_output(process):
    """What a group prints on stdout and stderr. These end with the last of its processes: a left-over one times out."""
    return process.communicate(timeout=60)


needs_groups = pytest.mark.skipif(not hasattr(os, "killpg"), reason="process groups are POSIX's")


@needs_groups
@pytest.mark.parametrize(
    ("method", "name"),
    [("fork", signal.SIGTERM), ("fork", signal.SIGINT), ("spawn", signal.SIGTERM), ("forkserver", signal.SIGTERM)],
)
def test_interrupt_of_the_process_group_saves_with_workers(places, tmp_path, method, name):
    """Sent twice, as `timeout` does, and to a worker that still imports."""
    with training_with_workers(places, tmp_path, method) as process:
        if method != "fork":
            wait_for(tmp_path, "importing_*")
            for path in tmp_path.glob("importing_*"):
                os.kill(int(path.stem.split("_")[1]), name)
        wait_for(tmp_path / "model_dir", "sdsen/latest.pth")
        for _ in range(2):
            os.killpg(process.pid, name)
        output, errors = rest_of_output(process)
    assert process.returncode == 0, output + errors
    assert "Traceback" not in errors
    step = read(tmp_path, "latest").step
    assert re.findall(r"stopped at step (\d+)", output) == [str(step)]
    call("-a", "train", *places, "--num_workers", 0, "--steps", step + 1)
    assert read(tmp_path, "latest").step == step + 1


@needs_groups
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_end_with_a_killed_training(places, tmp_path, method):
    with training_with_workers(places, tmp_path, method) as process:
        wait_for(tmp_path / "model_dir", "sdsen/latest.pth")
        process.kill()
        rest_of_output(process)


@needs_groups
@pytest.mark.parametrize(
    ("words", "first", "status"), [(["--lr", 1e30, "--milestones"], "", 2), ([], "main.train_step = None", 1)]
)
def test_workers_do_not_keep_a_training_from_ending_by_an_error(places, tmp_path, words, first, status):
    """Neither by one that the user sees, nor by another, whose traceback holds on to the batches."""
    with training_with_workers(places, tmp_path, "fork", *words, first=first) as process:
        _, errors = rest_of_output(process)
    assert process.returncode == status, errors


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_finishes_the_step_and_saves(places, tmp_path, name):
    process = start_long_run(places)
    wait_for(tmp_path / "model_dir", "sdsen/latest.pth")
    process.send_signal(name)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    step = read(tmp_path, "latest").step
    assert f"stopped at step {step}; the same command goes on" in output
    assert output.rstrip().splitlines()[-2].startswith(f"step {step}/100000") or step % 20 == 0


def test_a_run_is_trained_by_one_process_at_a_time(places, tmp_path):
    process = start_long_run(places)
    try:
        wait_for(tmp_path / "model_dir", "sdsen/latest.pth")
        with pytest.raises(UserError, match="run sdsen is in training already, by another process"):
            call("-a", "train", *places)
        call("-a", "train", *SMALL, *LONG, *places, "--steps", 1, "--run", "other")
    finally:
        process.kill()
        process.communicate()
    step = read(tmp_path, "latest").step
    call("-a", "train", *places, "--steps", step + 1)
    assert read(tmp_path, "latest").step == step + 1


def test_kill_leaves_the_last_good_checkpoint_and_the_steps_go_on(places, tmp_path):
    process = start_long_run(places, "--save_minutes", 0)  # writes a checkpoint in every step
    wait_for(tmp_path / "model_dir", "sdsen/step_20.pth")
    process.kill()
    process.communicate()
    step = read(tmp_path, "latest").step
    assert step >= 20
    call("-a", "train", *places, "--steps", step + 3)
    steps = [
        int(line.split()[3].split("/")[0])
        for line in (tmp_path / "log_dir" / "sdsen" / "train.log").read_text().splitlines()
        if line.split()[2] == "step"
    ]
    assert steps[-3:] == [step + 1, step + 2, step + 3]
    call("-a", "train", *SMALL, *places, "--run", "unbroken", "--steps", step + 3, "--save_steps", 1000)
    assert same_state(read(tmp_path, "latest"), read(tmp_path, "latest", "unbroken"))


def test_loss_that_is_not_finite_stops_the_run(places, tmp_path):
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 2)
    before = read(tmp_path, "latest")
    result = script("-a", "train", *places, "--lr", "1e30", "--steps", 50, "--save_steps", 50, "--milestones")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "the loss is nan in step" in result.stderr or "the loss is inf in step" in result.stderr
    assert "at learning rate 1e+30" in result.stderr
    assert str(tmp_path / "model_dir" / "sdsen" / "latest.pth") in result.stderr
    assert same_state(read(tmp_path, "latest"), before)


def test_weights_that_are_not_finite_replace_no_checkpoint(places, tmp_path, monkeypatch):
    """The loss of a step is finite, its gradient is not, and a checkpoint is due right behind it."""
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 2)
    before = files(tmp_path / "model_dir")
    states = {name: read(tmp_path, name) for name in ("latest", "best")}

    def spoil(network, *arguments):
        result = step(network, *arguments)
        network.dec[3].bias.data[0] = float("nan")
        return result

    step = main.train_step
    monkeypatch.setattr(main, "train_step", spoil)
    with pytest.raises(UserError, match=r"the weights are not finite after step 3 at learning rate 0\.001: lower --lr"):
        call("-a", "train", *places, "--steps", 3)
    assert files(tmp_path / "model_dir") == before
    assert all(same_state(read(tmp_path, name), state) for name, state in states.items())


def test_a_full_memory_is_one_line_that_says_what_takes_less(places, tmp_path, monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate\n 2.00 GiB")

    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    monkeypatch.setattr(main, "train_step", full)
    with pytest.raises(UserError) as error:
        call("-a", "train", *places, "--accumulate", 3, "--steps", 2)
    text = str(error.value)
    assert "\n" not in text
    assert "the memory of cpu is too small for batch_size 2 in 3 part(s): --accumulate 6 gives" in text
    assert text.endswith(f"the last good checkpoint is {tmp_path / 'model_dir' / 'sdsen' / 'latest.pth'}")


def test_another_error_of_a_step_comes_through(places, monkeypatch):
    def wrong(*_):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(main, "train_step", wrong)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)


# ---------------------------------------------------------------- bad input


def refused(result, *parts):
    """One line, no traceback, a status that is not 0."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert str(part) in result.stderr
    return True


def files(folder):
    return sorted(str(path) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--chanel", "3"], "the nearest is --channel"),
        (["-p", "sdsn"], "the nearest is sdsen"),
        (["--device", "cuda:99"], "no such device" if not torch.cuda.is_available() else "CUDA devices"),
        (["--device", "abacus"], "none of auto, cpu"),
        (["-m", "nowhere"], "no checkpoint 'nowhere' in"),
        (["--patch_size", "1000"], "smaller than the patch of 1000x1000"),
        (["--aggregation", "max", "--group", "z2"], "aggregation max and mean pool orientations"),
        (["--clean_dir", "photographs"], "name its style with --rain"),
        (["--clean_dir", "nowhere", "--rain", "rain100h"], "nowhere is missing: clean_dir is a folder of clean images"),
    ],
)
def test_command_that_is_refused_writes_nothing(places, tmp_path, words, part):
    before = files(tmp_path)
    assert refused(script("-a", "train", *SMALL[:-2], *places, *words), part)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda data: shutil.rmtree(data), "is missing: a data set has the folders train, val and test"),
        (lambda data: shutil.rmtree(data / "val"), "is missing"),
        (lambda data: [path.unlink() for path in (data / "train").iterdir()], "holds no images"),
        (lambda data: (data / "train" / "1.png").write_text("text"), "1.png is no image that can be read"),
        (lambda data: cv2.imwrite(str(data / "train" / "1.png"), np.zeros((40, 33, 3))), "33 pixels wide, an odd"),
        (lambda data: (data / "val" / "0.png").write_text("text"), "0.png is no image that can be read"),
    ],
)
def test_data_that_is_refused(places, tmp_path, spoil, part):
    spoil(tmp_path / "data")
    assert refused(script("-a", "train", *SMALL, *places, "--steps", 1), part)


def test_missing_and_foreign_checkpoints_are_never_random_weights(places, tmp_path):
    assert refused(script("-a", "test", *places), "no checkpoint 'sdsen' in", "there is none yet")
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    assert refused(script("-a", "test", *places, "-m", "dsen"), "there are sdsen/best, sdsen/latest, sdsen/step_1")
    assert refused(script("-a", "test", *places, "-m", "sdsen", "-p", "dsen"), "leave -p out")
    assert refused(script("-a", "test", *places, "-m", "sdsen", "--channel", "4"), "belongs to another network")
    assert refused(script("-a", "train", *places, "--channel", "4"), "was trained with channel 2, not 4")
    assert refused(script("-a", "train", *places, "-m", "sdsen/step_1"), "name another run with --run")


def test_training_from_anothers_weights_needs_a_run_of_its_own(places, tmp_path):
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    call("-a", "train", *places, "-m", "sdsen/step_1", "--run", "second", "--steps", 2)
    assert read(tmp_path, "latest", "second").step == 2
    assert read(tmp_path, "latest").step == 1


def test_a_run_that_is_named_as_checkpoint_goes_on_in_its_place(places, tmp_path):
    call("-a", "train", *SMALL, *LONG, *places, "--run", "mine", "--steps", 1)
    call("-a", "train", *places, "-m", "mine", "--steps", 2)
    call("-a", "train", *places, "-m", "mine/latest", "--steps", 3)
    assert read(tmp_path, "latest", "mine").step == 3
    assert not (tmp_path / "model_dir" / "sdsen").exists()


def test_stages_can_be_added_but_not_unasked(places, tmp_path):
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    old = read(tmp_path, "latest")
    with pytest.raises(UserError, match="was trained with stage_num 2, not 4: name another run with --run, or say"):
        call("-a", "train", "-p", "sdsen_s4", *SMALL[:-4], *places, "--run", "sdsen", "--steps", 2)
    call("-a", "train", *places, "-m", "sdsen/latest", "--run", "grown", "--stage_num", 4, "--steps", 2)
    new = read(tmp_path, "latest", "grown")
    assert new.settings.stage_num == 4
    assert new.optimizer["state"][0]["step"] == 2
    assert new.best_psnr != old.best_psnr
    assert (tmp_path / "model_dir" / "grown" / "best.pth").is_file()


def test_interrupted_trainings_log_handler_goes(places):
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    assert len(main.log.handlers) == 1
    with pytest.raises(UserError):
        call("-a", "train", *SMALL, *LONG, *places, "--run", "b", "--steps", 9, "--lr", "1e30")
    assert len(main.log.handlers) == 1

"""The training step, the command line, and `-a test`: gradients, scores, files, and errors for bad input."""

import os
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch

import losses
import main
import model
from base.errors import BadArgument, DamagedFile, Mismatch, MissingFile, Occupied
from base.files import ROOT
from commands import LONG, OTHERS, SMALL, call, files, read, read_csv, scalars
from presets import PRESETS
from runs import checkpoints, optimization
from settings import resolve


def test_clip_norm_bounds_the_step():
    """Without momentum and with learning rate 1, the step is the gradient."""
    O, B = torch.rand(2, 3, 16, 16), torch.zeros(2, 3, 16, 16)
    lengths = {}
    for clip_norm in (0.0, 1e-3):
        settings = resolve("dsen", {"channel": 2, "depth": 4, "clip_norm": clip_norm})
        torch.manual_seed(0)
        network = model.build(settings)
        before = torch.nn.utils.parameters_to_vector(network.parameters())
        main.train_step(network, torch.optim.SGD(network.parameters(), lr=1.0), O, B, settings, False)
        after = torch.nn.utils.parameters_to_vector(network.parameters())
        lengths[clip_norm] = (after - before).norm().item()
    assert lengths[0.0] > 0.01
    assert lengths[1e-3] == pytest.approx(1e-3, rel=1e-3)


def test_clip_norm_bounds_the_network_and_the_segmentation_together():
    settings = resolve("php", {"clip_norm": 1e-3, "segmentation_weight": 5.0})
    torch.manual_seed(0)
    both = torch.nn.ModuleList([model.build(settings), losses.build(settings, True)])
    before = torch.nn.utils.parameters_to_vector(both.parameters())
    labels = torch.randint(19, (2, 16, 16))
    optimizer = torch.optim.SGD(both.parameters(), lr=1.0)
    main.train_step(both[0], optimizer, *torch.rand(2, 2, 3, 16, 16), settings, False, both[1], labels)
    step = torch.nn.utils.parameters_to_vector(both.parameters()) - before
    assert step.norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert step[-96899:].norm() > 1e-5  # the segmentation's part


@pytest.mark.parametrize("loss", losses.STAGE_LOSSES)
def test_crops_in_parts_give_the_whole_batchs_gradients(loss, monkeypatch):
    O, B = torch.rand(2, 5, 3, 16, 16)
    settings = resolve("sdsen_s2", {"channel": 2, "depth": 4, "loss": loss})
    results = []
    for pixels in (10**6, 2 * 16 * 16, 1):  # all crops at once, two at a time with one left over, one at a time
        monkeypatch.setattr(optimization, "PART_PIXELS", pixels)
        torch.manual_seed(0)
        network = model.build(settings)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
        result = main.train_step(network, optimizer, O, B, settings, True)
        results.append((result, torch.cat([p.grad.flatten() for p in network.parameters()])))
    whole, gradient = results[0]
    assert set(whole) == {"loss", *(f"stage_{t}/{name}" for t in (1, 2) for name in ("loss", "psnr", "ssim"))}
    for result, other in results[1:]:
        assert result == pytest.approx(whole, rel=1e-5)
        assert (other - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize(("accumulate", "parts"), [(1, [5]), (2, [3, 2]), (3, [2, 2, 1]), (9, [1] * 5)])
def test_accumulated_parts_give_the_whole_batchs_gradients(accumulate, parts, monkeypatch):
    monkeypatch.setattr(optimization, "PART_PIXELS", 10**6)
    O, B = torch.rand(2, 5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = resolve("sdsen_s2", {"channel": 2, "depth": 4, "accumulate": accumulate})
    torch.manual_seed(0)
    network, seen = model.build(settings), []
    loss = sum(losses.STAGE_LOSSES["mse"](R, O, B) for R in network(O))
    wanted = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(network.parameters()))])
    network.register_forward_hook(lambda network, inputs, _: seen.append(len(inputs[0])))
    result = main.train_step(network, torch.optim.SGD(network.parameters(), lr=0.0), O, B, settings, False)
    assert seen == parts
    assert result["loss"] == pytest.approx(loss.item(), rel=1e-5)
    gradient = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    assert (gradient - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("name", OTHERS)
def test_accumulated_parts_of_other_networks_give_the_whole_batchs_gradients(name, monkeypatch):
    monkeypatch.setattr(optimization, "PART_PIXELS", 10**6)
    O, B = torch.rand(2, 5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    results, seen = [], []
    for accumulate in (1, 2):
        torch.manual_seed(0)
        values = {"stage_num": 2, "depth": 2, "channel": 4} if name == "coarse2fine" else {}
        settings = resolve(name, {**values, "accumulate": accumulate})
        network = model.build(settings)
        network.register_forward_hook(lambda network, inputs, _: seen.append(len(inputs[0])))
        result = main.train_step(network, torch.optim.SGD(network.parameters(), lr=0.0), O, B, settings, True)
        results.append((result, torch.cat([parameter.grad.flatten() for parameter in network.parameters()])))
    (whole, gradient), (parts, other) = results
    assert seen == [5, 3, 2]
    assert ("colour" if name == "php" else "l1") in whole
    assert parts == pytest.approx(whole, rel=1e-5)
    assert (other - gradient).norm() < 1e-5 * gradient.norm()


def test_a_loss_that_is_not_finite_in_one_part_changes_nothing(monkeypatch):
    monkeypatch.setattr(optimization, "PART_PIXELS", 1)
    settings = resolve("dsen", {"channel": 2, "depth": 4})
    network = model.build(settings)
    before = torch.nn.utils.parameters_to_vector(network.parameters()).clone()
    O, B = torch.rand(2, 3, 3, 16, 16)
    O[1] = float("nan")
    result = main.train_step(network, torch.optim.SGD(network.parameters(), lr=1.0), O, B, settings, False)
    assert np.isnan(result["loss"])
    assert torch.equal(torch.nn.utils.parameters_to_vector(network.parameters()), before)


def test_validation_scores_are_those_of_test(places, tmp_path):
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
            assert curves[f"val_stages/{metric}_{stage}"][-1][1] == pytest.approx(mean, abs=1e-4)


def test_test_scores_the_image_that_would_be_saved(places, tmp_path, monkeypatch):
    """A network that predicts no rain: its scores are the input's, and there is a warning."""
    warnings = []
    monkeypatch.setattr(main.log, "warning", warnings.append)
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    state = read(tmp_path, "latest")
    state.network["dec.3.weight"].zero_()
    state.network["dec.3.bias"].zero_()
    checkpoints.save(tmp_path / "model_dir" / "nothing.pth", state)
    call("-a", "test", *places, "-m", "nothing")
    joined = cv2.imread(str(tmp_path / "data" / "test" / "1.png")).astype(float)
    psnr = 10 * np.log10(255**2 / np.mean((joined[:, :48] - joined[:, 48:]) ** 2))
    row = read_csv(tmp_path / "log_dir" / "test_nothing.csv")[1]
    assert float(row["psnr_input"]) == pytest.approx(psnr, abs=1e-4)
    assert float(row["psnr_stage_2"]) == float(row["psnr_input"])
    assert float(row["psnr_stage_2"]) > 0
    assert float(row["change"]) == 0
    assert len(warnings) == 1


def test_mean_scores_leave_out_an_image_too_small_for_ssim(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(main.log, "info", lines.append)
    scores = np.full((2, 2, 4), 0.25)
    scores[1, :, 1] = np.nan
    main.write_scores(tmp_path / "scores.csv", [(f"{i}.png", 9, 9, 1.0, each) for i, each in enumerate(scores)])
    assert [line.split()[1:] for line in lines[1:]] == [["0.2500"] * 4] * 2
    assert [row["ssim_input"] for row in read_csv(tmp_path / "scores.csv")] == ["0.250000", "nan"]


def test_a_broken_pair_costs_only_its_own_scores(places, tmp_path, monkeypatch):
    warnings = []
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    assert call("-a", "test", "-m", "sdsen", *places) == 0
    whole = read_csv(tmp_path / "log_dir" / "sdsen" / "test_best.csv")
    broken = tmp_path / "data" / "test" / "0.png"
    broken.write_bytes(broken.read_bytes()[:200])
    monkeypatch.setattr(main.log, "warning", warnings.append)
    assert call("-a", "test", "-m", "sdsen", *places) == 1
    assert read_csv(tmp_path / "log_dir" / "sdsen" / "test_best.csv") == whole[1:]
    assert any(str(broken) in warning for warning in warnings)
    (tmp_path / "data" / "test" / "1.png").write_text("no image either")
    with pytest.raises(DamagedFile):
        call("-a", "test", "-m", "sdsen", *places)


def test_scores_lie_with_the_run_of_the_checkpoints_folder(places, tmp_path):
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    (tmp_path / "model_dir" / "sdsen").rename(tmp_path / "model_dir" / "renamed")
    call("-a", "test", "-m", "renamed", *places)
    assert [path.name for path in (tmp_path / "log_dir" / "renamed").iterdir()] == ["test_best.csv"]


@pytest.mark.parametrize("words", [["-a", "export", "--run", "train"], ["--action=export"]])
def test_the_help_is_that_of_the_action(words, capsys):
    with pytest.raises(SystemExit):
        call(*words, "-h", "all")
    text = capsys.readouterr().out
    assert "--stage_num" in text
    assert "--lr" not in text


def test_names_that_are_no_text_are_written(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    main.write_scores(tmp_path / "scores.csv", [(name, 9, 9, 1.0, np.ones((2, 4)))])
    assert [row["image"] for row in read_csv(tmp_path / "scores.csv")] == ["caf\\udce9.png"]


@pytest.mark.slow
def test_names_that_the_terminal_cannot_print(places, tmp_path):
    """A name that is no UTF-8, a terminal of ASCII: in messages, errors, train.log, CSV and settings."""
    odd = os.fsdecode(b"r\xe9gen\xff")
    (tmp_path / "data").rename(tmp_path / odd)
    (tmp_path / odd / "test" / "0.png").write_text("no image")
    (tmp_path / odd / "test" / "1.png").rename(tmp_path / odd / "test" / f"{odd}é.png")
    words = [*places, "--data_dir", tmp_path / odd, "--run", odd]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    for action, status in (("train", 0), ("test", 1)):
        command = [sys.executable, ROOT / "config" / "main.py", "-a", action, *words]
        command += [*SMALL, "--steps", "1", "--log_steps", "1"] if action == "train" else []
        result = subprocess.run([os.fsencode(word) for word in command], capture_output=True, env=environment)
        assert (result.returncode, b"Error" in result.stderr) == (status, False), result.stderr
    assert len(read_csv(tmp_path / "log_dir" / odd / "test_best.csv")) == 1
    assert r"r\udce9gen" in (tmp_path / "log_dir" / odd / "train.log").read_text()


def test_float16_is_for_tests(places, tmp_path):
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    scores = {}
    for precision in ("float32", "fp16"):
        call("-a", "test", "-m", "sdsen", *places, "--precision", precision)
        rows = read_csv(tmp_path / "log_dir" / "sdsen" / "test_best.csv")
        scores[precision] = [float(row["psnr_stage_2"]) for row in rows]
    assert scores["fp16"] == pytest.approx(scores["float32"], abs=0.02)


def test_models_lists_every_preset(capsys):
    call("-a", "models")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(PRESETS)
    assert "130998" in next(line for line in lines if line.startswith("sdsen "))


@pytest.mark.parametrize(
    ("words", "error", "part"),
    [
        (["--chanel", "3"], BadArgument, "--channel"),
        (["-p", "sdsn"], BadArgument, "sdsen"),
        (["--device", "cuda:99"], BadArgument, "cuda:99"),
        (["--device", "abacus"], BadArgument, "abacus"),
        (["-m", "nowhere"], MissingFile, "nowhere"),
        (["--patch_size", "1000"], Mismatch, "patch_size"),
        (["--aggregation", "max", "--group", "z2"], BadArgument, "aggregation"),
        (["--clean_dir", "photographs"], BadArgument, "--rain"),
        (["--clean_dir", "nowhere", "--rain", "rain800"], MissingFile, "nowhere"),
    ],
)
def test_command_that_is_refused_writes_nothing(places, tmp_path, words, error, part):
    """`part` is the setting, or the value, that the error names."""
    before = files(tmp_path)
    with pytest.raises(error, match=part) as caught:
        call("-a", "train", *SMALL[:-2], *places, *words)
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "words",
    [
        *(["-a", action] for action in ("export", "tilt")),
        *(["-a", action, "-p", "sdsen", "-m", "sdsen"] for action in ("models", "export", "tilt")),
        ["-a", "models", "--run", "sdsen"],
        ["-a", "tables", "-m", "sdsen"],
        ["-a", "test", "-m", "one", "two"],
    ],
)
def test_arguments_that_an_action_does_not_take(words):
    with pytest.raises(BadArgument):
        call(*words)


def test_an_error_of_a_process_is_one_line_and_exit_status_2(places):
    """From a foreign working directory."""
    command = [sys.executable, str(ROOT / "config" / "main.py"), "-a", "train", *places, "--chanel", "3"]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("spoil", "error", "part"),
    [
        (lambda data: shutil.rmtree(data), MissingFile, "data"),
        (lambda data: shutil.rmtree(data / "val"), MissingFile, "val"),
        (lambda data: [path.unlink() for path in (data / "train").iterdir()], MissingFile, "train"),
        (lambda data: (data / "train" / "1.png").write_text("text"), DamagedFile, r"train/1\.png"),
        (lambda data: cv2.imwrite(str(data / "train" / "1.png"), np.zeros((40, 33, 3))), Mismatch, r"train/1\.png"),
        (lambda data: (data / "val" / "0.png").write_text("text"), DamagedFile, r"val/0\.png"),
    ],
)
def test_data_that_is_refused(places, tmp_path, spoil, error, part):
    spoil(tmp_path / "data")
    with pytest.raises(error, match=part):
        call("-a", "train", *SMALL, *places, "--steps", 1)


def test_missing_and_foreign_checkpoints_are_never_random_weights(places):
    with pytest.raises(MissingFile):
        call("-a", "test", *places)
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    for words, error in (
        (["-a", "test", "-m", "dsen"], MissingFile),
        (["-a", "test", "-m", "sdsen", "-p", "dsen"], Mismatch),
        (["-a", "test", "-m", "sdsen", "--channel", 4], Mismatch),
        (["-a", "train", "--channel", 4], Mismatch),
        (["-a", "train", "-m", "sdsen/step_1"], Occupied),
    ):
        with pytest.raises(error):
            call(*words, *places)

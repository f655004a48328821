"""The yardstick: the plain reference is the published code, the product agrees with it, and the bench measures both."""

import json
import subprocess
import time

import numpy as np
import pytest
import torch

import bench
import checkpoint as checkpoints
import model
import recipe
import reference
import trainings
from common import ROOT, UserError
from conftest import GOLDEN
from settings import resolve

CPU = torch.device("cpu")


def both(name, seed=0):
    """The product's network and the plain one, with the same weights."""
    torch.manual_seed(seed)
    network = model.build(name)
    return network, reference.build(resolve(name), network.state_dict())


@pytest.mark.parametrize("name", ["dsen", "sdsen"])
def test_reference_has_the_published_outputs_at_every_stage(name):
    arrays = np.load(GOLDEN / f"{name}.npz")
    state = {key.removeprefix("state/"): torch.tensor(arrays[key]) for key in arrays.files if key.startswith("state/")}
    plain = reference.build(resolve(name), state)
    with torch.inference_mode():
        rain_layers = plain(torch.tensor(arrays["input"]))
    for R, expected in zip(rain_layers, torch.tensor(arrays["output"]), strict=True):
        assert (R - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["dsen", "mdsen", "sdsen_s4"])
@pytest.mark.parametrize("training", [True, False])
def test_product_agrees_with_the_reference_at_an_odd_size(name, training):
    network, plain = both(name)
    O = torch.rand(2, 3, 37, 23)
    with torch.inference_mode(not training):
        pairs = list(zip(network.train(training)(O), plain.train(training)(O), strict=True))
    assert max((a - b).abs().max() for a, b in pairs) < 1e-5


@pytest.mark.parametrize("name", ["dsen", "sdsen_s2"])
def test_product_has_the_gradients_of_the_reference(name):
    network, plain = both(name)
    O, B = torch.rand(2, 2, 3, 21, 30)
    for other in (network, plain):
        sum(torch.nn.functional.mse_loss(R, O - B) for R in other(O)).backward()
    gradients = dict(plain.named_parameters())
    for parameter_name, parameter in network.named_parameters():
        expected = gradients[parameter_name].grad
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm(), parameter_name


@pytest.mark.parametrize("name", ["cnn", "dsen_maxpool", "dsen_wo_se", "mdsen_sc"])
def test_reference_refuses_other_networks(name):
    with pytest.raises(UserError, match=f"not {name}"):
        reference.build(resolve(name), {})


@pytest.mark.parametrize(("kind", "size"), [("inference", (17, 22)), ("training", (2, 16))])
def test_both_sides_are_measured_and_agree(kind, size):
    settings = resolve("sdsen_s2", {"batch_size": 2, "patch_size": 16})
    numbers = bench.measure(kind, settings, CPU, size, 2, 0)
    assert numbers["difference"] < 1e-5
    assert [len(numbers[side]["seconds"]) for side in bench.SIDES] == [2, 2]
    pixels = 17 * 22 if kind == "inference" else 3 * 2 * 16 * 16
    assert numbers["nominal_gflop"] == pytest.approx(2e-9 * 2 * 493030 * pixels)
    numbers["peaks"] = {side: bench.peak_memory(side, kind, settings, CPU, size) for side in bench.SIDES}
    assert all(peak["before"] > 2**20 <= 2**20 + peak["added"] for peak in numbers["peaks"].values())
    limits = bench.measure_limits(CPU, 64, 1)
    text = bench.table("title", [*bench.SIDES, "ratio"], bench.kind_rows(json.loads(json.dumps(numbers)), limits))
    assert f"{numbers['speedup']:.2f} times faster" in text
    assert len(text.splitlines()) == 9


def test_traffic_of_sdsen():
    planes = (3 + 40) + 4 * (80 + 40) + 4 * (40 + 40) + (40 + 10) + (10 + 3)
    assert bench.traffic_per_pixel(model.build("sdsen")) == 8 * 4 * planes


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_sections_are_those_of_the_device_or_those_named(kind):
    device = torch.device(kind)
    assert {"inference", "training", "data"} <= set(bench.sections_for(device, None)) <= set(bench.SECTIONS)
    assert bench.sections_for(device, ["variants"]) == ("variants",)


def test_variants_are_those_of_the_device():
    on_cpu, on_gpu = (set(bench.variants_for(torch.device(kind))) for kind in ("cpu", "cuda"))
    assert on_cpu | on_gpu == set(bench.VARIANTS)
    assert on_cpu ^ on_gpu == set(bench.ONLY_ON)


def test_runs_are_repeated_in_turn():
    calls = []
    runs = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = bench.alternate(runs, CPU, 3, 0)
    assert "".join(calls) == "ababab"
    assert [len(s) for s in seconds.values()] == [3, 3]
    assert len(bench.alternate(runs, CPU, None, 0)["a"]) == bench.LEAST
    assert len(bench.alternate(runs, CPU, None, 60)["a"]) == bench.MOST


def test_share_of_waiting_for_crops():
    settings = resolve("sdsen_s2", {"batch_size": 2, "patch_size": 16})
    numbers = bench.measure_data(settings, CPU, lambda: time.sleep(0.02), (20, 24), 2, 3)
    assert list(numbers) == ["stored pairs", "rain drawn, rain100h"]
    for row in numbers.values():
        waiting, step = row["waiting"]["median"], row["step"]["median"]
        assert step >= 0.02
        assert row["waiting_share"] == pytest.approx(waiting / (waiting + step))
        assert row["making_share"] == pytest.approx(row["making"]["median"] / (waiting + step))
    lines = bench.table("title", ["making", "waiting"], bench.data_rows(numbers)).splitlines()
    assert f"({numbers['stored pairs']['waiting_share']:.2%})" in lines[1]


@pytest.mark.parametrize("name", sorted({*bench.variants_for(CPU)} - {"bf16, torch.compile"}))
def test_every_variant_does_the_same_step(name):
    settings = resolve("sdsen_s2", {"batch_size": 4, "patch_size": 16})
    losses = [bench.make_variant(variant, settings, CPU, (4, 16))() for variant in ("reference, float32", name)]
    tolerance = 2e-3 if name.startswith("bf16") else 1e-2 if "bf16" in name else 1e-6
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    assert "bf16" not in name or losses[1] != losses[0]


def test_rows_of_variants_say_when_a_preparation_has_paid():
    def row(median, preparation):
        return {"median": median, "ratio": 2.0 / median, "preparation": preparation, "peak": {"added": 3 * 2**20}}

    rows = bench.variant_rows({"default": row(2.0, 1.0), "compiled": row(1.5, 61.0), "worse": row(3.0, 50.0)})
    assert rows[1] == ["compiled", "1.5000", "1.33", "61.0 (after 120 steps)", "3"]
    assert rows[2][3] == "50.0"


def test_the_papers_training_is_projected_from_a_part_of_it():
    lines = ["run run: 130998 parameters on cpu in float32, steps 0 to 100"]
    for step, rate in ((50, 8.0), (100, 32.0)):  # the first steps are slower: they are not projected
        lines.append(f"step {step}/100  loss 0.1  psnr 20.00 dB  lr 0.0005  {rate} images/s  waiting for data 0.1%")
    lines.append("validation at step 100: psnr by stage 19.10, 20.25 dB (input 18.00), ssim 0.7, 3.0 s")
    numbers = trainings.project(lines, 63.0, 16)
    assert numbers == pytest.approx({"start": 10, "step": 0.5, "validation": 3, "whole": 10 + 20000 * 0.5 + 40 * 3})
    assert trainings.validation_psnr(lines) == {100: 20.25}


def test_float32_and_bf16_are_trained_alike_and_compared(capsys):
    words = "--steps 2 --batch_size 2 -p dsen --channel 2 --depth 4 --patch_size 16".split()
    trainings.main(["curve", "--device", "cpu", *words])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["1", "2"]
    plain, half, difference = (float(cell) for cell in lines[2].split()[1:])
    assert difference == pytest.approx(half - plain, abs=0.011)
    assert abs(difference) < 0.1
    assert lines[3].startswith("largest difference 0.0")


def test_what_bf16_changes_in_images(tmp_path):
    settings = resolve("sdsen_s2", {"model_dir": str(tmp_path), "channel": 2, "depth": 4})
    torch.manual_seed(0)
    checkpoints.save(tmp_path / "made.pth", checkpoints.Checkpoint(model.build(settings).state_dict(), 0, settings))
    rows = trainings.compare_outputs("made", {"model_dir": str(tmp_path), "device": "cpu", "data_dir": ""})
    assert len(rows) == 6
    for row in rows:
        assert 0 < row["p999"] <= row["max"] < 1
        assert row["device"] == 0


def test_gpu_script_parses():
    assert subprocess.run(["bash", "-n", ROOT / "bench" / "gpu.sh"]).returncode == 0


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--repeats", "0"], ["--device", "tpu"], ["--what"]])
def test_arguments_that_are_not_possible(arguments):
    with pytest.raises(UserError):
        bench.main(arguments)


def test_trials_of_the_recipe_are_trained_once_and_their_validation_is_kept(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe.studies, "RESULTS", tmp_path)
    monkeypatch.setattr(recipe.tables, "RESULTS", tmp_path)
    small = resolve("sdsen_s2", {"channel": 2, "depth": 4})
    checkpoints.save(tmp_path / "start.pth", checkpoints.Checkpoint(model.build(small).state_dict(), 0, small))
    places = ["--model_dir", tmp_path / "models", "--log_dir", tmp_path / "logs", "--data_dir", data_dir]
    sizes = ["--patch_size", 16, "--steps", 2, "--save_steps", 1, "--val_images", 1, "--precision", "float32"]
    words = [str(word) for word in ["-m", tmp_path / "start.pth", "--only", "ssim", "flip", *places, *sizes]]
    recipe.main(words)
    found = json.loads((tmp_path / "tried.json").read_text())
    assert list(found) == ["ssim", "flip"]
    assert (found["flip"]["differences"], found["flip"]["step"]) == ("--aug_data flip", 2)
    trained = checkpoints.load(tmp_path / "models" / "try_flip" / "latest.pth")
    assert (trained.settings.aug_data, trained.settings.loss, trained.step) == ("flip", "ssim_l1", 2)
    recipe.main(words)  # both are done already
    assert json.loads((tmp_path / "tried.json").read_text()) == found

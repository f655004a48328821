"""The yardstick: the plain reference is the published code, the product agrees with it, and the bench measures both."""

import json
import time

import numpy as np
import pytest
import torch

import bench
import model
import reference
from common import UserError
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
    assert len(text.splitlines()) == 8


def test_traffic_of_sdsen():
    planes = (3 + 40) + 4 * (80 + 40) + 4 * (40 + 40) + (40 + 10) + (10 + 3)
    assert bench.traffic_per_pixel(model.build("sdsen")) == 8 * 4 * planes


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


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--repeats", "0"], ["--device", "tpu"], ["--what"]])
def test_arguments_that_are_not_possible(arguments):
    with pytest.raises(UserError):
        bench.main(arguments)

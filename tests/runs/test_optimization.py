"""Learning rate, optimizers, compiling and recording."""

import sys

import numpy as np
import pytest
import torch

import fake_graphs
from base.errors import BadArgument, Mismatch, MissingFile
from commands import LONG, SMALL, call, read, scalars
from fake_cuda import keep_on_cpu
from model import DSEN
from runs import optimization
from runs.optimization import in_steps, learning_rate, make_optimizer
from settings import resolve


def test_learning_rate():
    settings = resolve()
    rates = [learning_rate(settings, step) for step in (0, 14999, 15000, 17499, 17500, 19999)]
    assert rates == pytest.approx([5e-4, 5e-4, 5e-5, 5e-5, 5e-6, 5e-6])


def test_learning_rate_by_cosine_and_with_warmup():
    settings = resolve("sdsen", {"schedule": "cosine", "steps": 1000, "lr": 1.0})
    rates = [learning_rate(settings, step) for step in (0, 250, 500, 1000)]
    assert rates == pytest.approx([1.0, 0.505 + 0.495 * np.sqrt(0.5), 0.505, 0.01])
    settings = resolve("sdsen", {"warmup": 9, "lr": 1.0})
    assert [learning_rate(settings, step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])


def test_epochs_are_counted_in_steps():
    settings = resolve("php", {"batch_size": 4, "epochs": 3, "milestones": (1, 2), "steps": 77})
    counted = in_steps(settings, 10)
    assert (counted.epochs, counted.steps, counted.milestones) == (0, 9, (3, 6))
    assert in_steps(settings, 12).steps == 9
    assert in_steps(settings, 13).steps == 12
    settings = resolve("sdsen", {"steps": 77})
    assert in_steps(settings, 10) == settings


def test_soap_is_adam_in_turned_coordinates(places, tmp_path):
    """From the same weights, it goes elsewhere than Adam; its matrices are orthogonal."""
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
    with pytest.raises(Mismatch):
        call("-a", "train", "-m", "soap", *places, "--optimizer", "adam", "--steps", 4)


def test_soap_turns_channels_orientations_and_pixels():
    """A filter (out, in, 4, 5, 5) by matrices of `out`, of `in` with the orientations, and of the pixels."""
    network = DSEN(stage_num=2, link="concat")
    soap = make_optimizer(network, 1e-3, "soap")
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


def test_adam_is_the_papers():
    """Betas and eps are Adam's defaults, as Kingma and Ba suggest; no weight decay."""
    network = DSEN(channel=2, depth=4)
    (group,) = make_optimizer(network, 5e-4).param_groups
    values = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "amsgrad")}
    assert values == {"lr": 5e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False}
    assert sum(p.numel() for p in group["params"]) == sum(p.numel() for p in network.parameters())


def test_soap_without_its_package(places, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    monkeypatch.setitem(sys.modules, "pytorch_optimizer.optimizer.soap", None)
    with pytest.raises(MissingFile, match=r"requirements-soap\.txt"):
        call("-a", "train", *SMALL, *LONG, *places, "--steps", 1, "--optimizer", "soap")
    assert not (tmp_path / "model_dir").exists()


@pytest.mark.parametrize(("setting", "steps_that_pay", "calls"), [("on", 99, 1), ("off", 1, 0), ("auto", 1, 0)])
def test_the_network_is_compiled_where_it_is_requested(places, monkeypatch, setting, steps_that_pay, calls):
    """`auto` does so on a GPU alone, even where steps enough are left."""
    compiled = []
    monkeypatch.setattr(optimization, "COMPILE_STEPS", steps_that_pay)
    monkeypatch.setattr(torch, "__version__", "2.5.0")
    monkeypatch.setattr(DSEN, "compile", lambda network: compiled.append(network.training))
    with torch._dynamo.config.patch(suppress_errors=False):
        call("-a", "train", *SMALL, *LONG, *places, "--steps", 1, "--compile", setting)
    assert compiled == [True] * calls


def test_compiling_with_an_old_pytorch_is_refused(places, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.4.1")
    with pytest.raises(BadArgument):
        call("-a", "train", *SMALL, *LONG, *places, "--steps", 1, "--compile", "on")


PLANES = "--group z2 --channel 5 --precision float32 --device cuda".split()  # what the CPU's own code doesn't take


@pytest.mark.filterwarnings("ignore:.*pin_memory")
@pytest.mark.parametrize("words", ["--clip_norm 0.01", "--average 0.5 --loss ssim_l1", "--optimizer soap"])
def test_a_training_of_replayed_steps_is_the_training(places, tmp_path, cards, monkeypatch, words):
    """A rehearsal with recorded operations; a run that is interrupted and resumed records anew."""
    cards((8, 0))
    keep_on_cpu(monkeypatch)
    recorder = fake_graphs.install(monkeypatch)
    monkeypatch.setattr(optimization, "COMPILE_STEPS", 10**6)
    words = [*SMALL[:-2], *LONG, *places, *PLANES, *words.split()]
    call("-a", "train", *words, "--run", "replayed", "--steps", 3)
    call("-a", "train", *words, "--run", "replayed", "--steps", 5)
    replays = [graph.replays for graph in recorder.made]
    assert sum(replays) == 5
    assert len(replays) == 2
    call("-a", "train", *words, "--run", "launched", "--steps", 5, "--cuda_graphs", "off")
    assert len(recorder.made) == len(replays)
    weights = [
        state.average or state.network for state in (read(tmp_path, "latest", r) for r in ("replayed", "launched"))
    ]
    pairs = zip(*(state.values() for state in weights), strict=True)
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
    with pytest.raises(BadArgument):
        call("-a", "train", *words, "--run", "requested", "--cuda_graphs", "on")

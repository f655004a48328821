"""What a checkpoint's file may hold: other programs' names and wrappers, and nothing that is damaged."""

import random

import pytest
import torch

import model
from base.errors import BadArgument, DamagedFile, Mismatch, NotFinite, UserError
from commands import LONG, SMALL, call
from runs import checkpoints, training
from runs.checkpoints import choose_start
from runs.restore import open_network
from settings import resolve

SETTINGS = resolve("dsen", {"channel": 2, "depth": 4})


@pytest.fixture
def weights():
    return model.build(SETTINGS).state_dict()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "foreign.pth"


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "params", "net"])
def test_weights_of_another_program(path, weights, prefix, wrapper):
    named = {prefix + name: weight for name, weight in weights.items()}
    torch.save({wrapper: named, "epoch": 3} if wrapper else named, path)
    read = checkpoints.load(path)
    assert (read.step, read.settings, read.optimizer) == (0, None, None)
    checkpoints.load_weights(model.build(SETTINGS), read, path)
    assert all(torch.equal(read.network[name], weight) for name, weight in weights.items())


def test_a_wrapper_is_the_name_of_weights_and_not_of_anything_else(path, weights):
    torch.save({"model": "dsen", "model_state_dict": weights}, path)
    assert checkpoints.load(path).network.keys() == weights.keys()


def test_a_network_that_no_memory_holds_is_refused_before_it_is_made(path, weights):
    settings = resolve("dsen", {"channel": 1000, "depth": 1000})
    with pytest.raises(BadArgument):
        checkpoints.build(settings, None, path)
    with pytest.raises(Mismatch):
        checkpoints.build(SETTINGS, checkpoints.Checkpoint({"other": torch.zeros(1)}), path)


def test_names_of_averaged_and_compiled_weights(path, weights):
    averaged = {"n_averaged": torch.tensor(3), **{f"module._orig_mod.{name}": w + 1 for name, w in weights.items()}}
    values = {"format": 1, "network": weights, "step": 3, "settings": None, "average": averaged}
    torch.save(values, path)
    assert checkpoints.load(path).average.keys() == weights.keys()


@pytest.mark.parametrize("clock", [7, {"step": 7, "epoch": 1}])
def test_the_published_codes_clock(path, weights, clock):
    torch.save({"net": weights, "clock": clock, "opt": None}, path)
    assert checkpoints.load(path).step == 7


@pytest.mark.parametrize("clock", [-1, True, "7", 7.5, None, {"epoch": 1}, {"step": "x"}, 10**30])
def test_a_clock_that_is_none(path, weights, clock):
    torch.save({"net": weights, "clock": clock, "opt": None}, path)
    with pytest.raises(DamagedFile):
        checkpoints.load(path)


@pytest.mark.parametrize("field", ["network", "average", "criterion"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e300])
def test_a_weight_that_is_not_finite_is_named(path, weights, field, value):
    spoilt = {name: weight.double() for name, weight in weights.items()}  # 1e300 is infinite as float32
    spoilt["dec.3.bias"][1] = value
    values = {"format": 1, "network": weights, "step": 3, "settings": None, field: spoilt}
    torch.save(values, path)
    with pytest.raises(NotFinite, match=rf"dec\.3\.bias.*{path.name}"):
        checkpoints.load(path)


def test_a_flipped_bit(path, weights):
    torch.save(weights, path)
    data = bytearray(path.read_bytes())
    data[data.find(weights["re_layer.0.weight"].numpy().tobytes()) + 3] ^= 0x40
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["re_layer.0.weight"].isfinite().all()
    with pytest.raises(DamagedFile):
        checkpoints.load(path)


@pytest.mark.parametrize("psnr", [float("inf"), 70.0])
def test_a_best_score_above_the_bound_is_none(path, weights, psnr):
    torch.save({"format": 1, "network": weights, "step": 3, "settings": None, "best_psnr": psnr}, path)
    assert checkpoints.load(path).best_psnr is None


VALUES = [
    *(None, True, -1, 0, 3, 10**6, 2**70, 0.5, float("nan"), float("inf"), "", "text", "\udc80", b"bytes"),
    *((), (1, "a"), [], [2], {}, {"a": 1}, {3: 4}),
    *(torch.zeros(()), torch.zeros(2, 3), torch.tensor(-1), torch.zeros(3, dtype=torch.uint8)),
    *(torch.zeros(2, dtype=torch.complex64), torch.eye(2).to_sparse()),
]


def spoil(values, rng):
    """Replace, remove, add or resize something in nested dicts, lists and tensors; a copy."""
    if isinstance(values, dict) and values and rng.random() < 0.8:
        key = rng.choice([*values])
        rest = {name: value for name, value in values.items() if name != key}
        kind = rng.random()
        return rest if kind < 0.1 else {**rest, rng.choice(["x", 7, key]): spoil(values[key], rng)}
    if isinstance(values, list | tuple) and values and rng.random() < 0.8:
        index = rng.randrange(len(values))
        return [*values[:index], spoil(values[index], rng), *values[index + rng.randrange(2) :]]
    if isinstance(values, torch.Tensor) and not (values.is_sparse or values.is_complex()) and rng.random() < 0.6:
        return rng.choice([values[None], values.flatten()[:1], values.double() * 1e30, values.long(), -values.float()])
    return rng.choice(VALUES)


@pytest.mark.slow
def test_damaged_fields_are_errors_for_the_user_or_do_no_harm(places, tmp_path):
    """Neither opening such a checkpoint, nor resuming there and taking a step, ends with another error."""
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 2, "--average", 0.5)
    latest = tmp_path / "model_dir" / "sdsen" / "latest.pth"
    values, rng, folders = torch.load(latest, weights_only=True), random.Random(0), {"model_dir": places[1]}
    resumed = training.Training(choose_start(None, None, folders))
    refused = []
    for _ in range(300):
        spoilt = dict(values)
        for _ in range(rng.choice([1, 1, 2])):
            field = rng.choice(["optimizer", "random", "settings", *values])
            spoilt[field] = spoil(spoilt[field], rng)
        torch.save(spoilt, latest)
        try:
            open_network(None, "sdsen/latest", folders)
            start = choose_start(None, None, folders)
            if start.checkpoint.optimizer is not None:
                resumed._resume(start.checkpoint, start.source)
                for parameter in resumed.trained.parameters():
                    parameter.grad = torch.ones_like(parameter)
                resumed.optimizer.step()
        except UserError as error:
            refused.append(str(error))
    assert 100 < len(refused) < 290
    assert not any("\n" in message for message in refused)

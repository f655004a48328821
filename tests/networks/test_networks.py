"""What the loops ask of every network, of the two that are not DSEN: whole images, little memory, cost, learning."""

import math
import re

import pytest
import torch

import cal_ssim
import losses
import main
import model
from base import devices
from base.errors import BadArgument, UserError
from conftest import make_pair
from dataset import to_tensor
from fast import windows
from fast.any_size import rain_layers
from runs.optimization import learning_rate, make_optimizer
from settings import resolve

CPU = torch.device("cpu")
SMALL = {"stage_num": 2, "depth": 2, "channel": 4}
CASES = {  # preset, what differs, halo
    "coarse2fine": (SMALL, 12),
    "coarse2fine_no_refinement": (SMALL, 10),
    "coarse2fine_single": ({"depth": 3, "channel": 4}, 9),
    "php": ({}, 105),
    "php_max_pooling": ({}, 104),
    "php_hierarchical": ({"refined": False}, 25),
    "php_non_local": ({}, None),
}
LOCAL = [name for name, (_, halo) in CASES.items() if halo]
FULL = RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
FULL_GPU = RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB")


def make(name):
    differences, halo = CASES[name]
    torch.manual_seed(1)
    network = model.build(resolve(name, differences)).eval()
    assert network.halo == halo
    return network


def image(height, width):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def plain(network, O):
    return torch.stack([R[0] for R in network(O[None])])


def staged(network, O, *how, **keywords):
    return torch.stack(list(rain_layers(network, O, *how, **keywords)))


def watch(network, monkeypatch, most=math.inf, error=FULL):
    """A list of the rows that `network.forward` gets in each call from now on; more than `most` raise `error`."""
    seen, forward = [], network.forward

    def watched(O, *stage_num):
        seen.append(O.shape[2])
        if O.shape[2] > most:
            raise error
        return forward(O, *stage_num)

    monkeypatch.setattr(network, "forward", watched)
    return seen


def set_rows(monkeypatch, width, rows, least=1):
    """Lets windows of an image `width` pixels wide start with `rows` rows, or twice the halo, and not fall below."""
    monkeypatch.setattr(windows, "CPU_PIXELS", rows * width)
    monkeypatch.setattr(windows, "MIN_ROWS", least)


def rows_with_halo(network, height, rows):
    """The rows that each window is computed from."""
    rows, halo, stride = rows // network.stride * network.stride, network.halo, network.stride
    starts = range(0, height, rows)
    return [min(height, top + rows + halo) - max(0, top - halo) // stride * stride for top in starts]


# ---------------------------------------------------------------- whole images


@pytest.mark.parametrize(("height", "width"), [(37, 23), (40, 26), (1, 9), (5, 1)])
@pytest.mark.parametrize("name", CASES)
def test_an_image_in_one_piece_is_the_forward_pass(name, height, width, monkeypatch):
    network, O, shares = make(name), image(height, width), []
    wanted = plain(network, O)
    seen = watch(network, monkeypatch)
    found = staged(network, O, tick=shares.append)
    assert found.shape == (network.output_num, 3, height, width)
    assert torch.equal(found, wanted)
    assert (seen, shares) == ([height], [1])


@pytest.mark.parametrize("height", [333, 420])
@pytest.mark.parametrize("name", LOCAL)
def test_windows_of_twice_the_halo_are_the_forward_pass(name, height, monkeypatch):
    network, O, shares = make(name), image(height, 7), []
    wanted = plain(network, O)
    set_rows(monkeypatch, 7, 1)
    seen = watch(network, monkeypatch)
    found = staged(network, O, tick=shares.append)
    assert (found - wanted).abs().max() < 1e-5
    assert seen == rows_with_halo(network, height, 2 * network.halo)
    assert len(shares) == len(seen) == math.ceil(height / (2 * network.halo)) > 1
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("rows", [17, 29, 60])
@pytest.mark.parametrize("name", ["coarse2fine", "coarse2fine_no_refinement", "coarse2fine_single"])
def test_windows_of_so_many_pixels(name, rows, monkeypatch):
    network, O = make(name), image(61, 13)
    wanted = plain(network, O)
    set_rows(monkeypatch, 13, rows)
    seen = watch(network, monkeypatch)
    assert (staged(network, O) - wanted).abs().max() < 1e-5
    assert seen == rows_with_halo(network, 61, max(rows, 2 * network.halo))


@pytest.mark.parametrize("name", LOCAL)
def test_no_memory_is_windows_of_the_least_rows(name, monkeypatch):
    network, O, shares = make(name), image(143, 9), []
    wanted = plain(network, O)
    seen = watch(network, monkeypatch)
    found = staged(network, O, memory_gib=1e-6, tick=shares.append)
    assert (found - wanted).abs().max() < 1e-5
    assert seen == rows_with_halo(network, 143, windows.MIN_ROWS)
    assert len(seen) == math.ceil(143 / 8)
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("rows", [50, 120])
@pytest.mark.parametrize("name", ["coarse2fine", "php"])
def test_windows_take_the_memory_that_there_is(name, rows, monkeypatch):
    network, O = make(name), image(301, 8)
    requested = rows + 2 * network.halo
    # What is kept besides: the rain layers, the image, and three of what the caller makes of it.
    besides = 4 * O.numel() * (network.output_num + 3)

    def little(budget, limit_gib):
        budget.left = besides + (requested + 0.5) * 8 * network.pixel_bytes

    monkeypatch.setattr(windows.MemoryBudget, "__init__", little)
    wanted = plain(network, O)
    seen = watch(network, monkeypatch)
    assert (staged(network, O) - wanted).abs().max() < 1e-5
    assert seen == rows_with_halo(network, 301, rows)
    assert max(seen) <= requested


def test_an_image_that_can_not_be_cut_goes_through_at_once(monkeypatch):
    network, O = make("php_non_local"), image(61, 9)
    wanted = plain(network, O)
    set_rows(monkeypatch, 9, 4)
    seen = watch(network, monkeypatch)
    assert torch.equal(staged(network, O, memory_gib=1e-6), wanted)
    assert seen == [61]


@pytest.mark.parametrize("memory_gib", [0.0, 1e-6])
@pytest.mark.parametrize("name", CASES)
def test_the_first_stages_alone(name, memory_gib):
    network, O = make(name), image(33, 12)
    wanted = plain(network, O)
    for count in range(1, network.output_num + 1):
        found = staged(network, O, count, memory_gib=memory_gib)
        assert len(found) == count
        assert (found - wanted[:count]).abs().max() < 1e-5


# ---------------------------------------------------------------- a full memory


@pytest.mark.parametrize("error", [FULL, FULL_GPU, torch.cuda.OutOfMemoryError("CUDA")])
@pytest.mark.parametrize(("name", "height", "most"), [("coarse2fine", 90, 40), ("php", 333, 250)])
def test_a_full_memory_halves_the_windows(name, height, most, error, monkeypatch):
    network, O, shares = make(name), image(height, 9), []
    wanted = plain(network, O)
    seen = watch(network, monkeypatch, most, error)
    found = staged(network, O, tick=shares.append)
    assert (found - wanted).abs().max() < 1e-5
    assert seen[:2] == [height, height // 2 + network.halo]  # the whole; half of it with the halo below
    assert seen[-1] <= most
    assert len(shares) == sum(rows <= most for rows in seen)
    assert sum(shares) == pytest.approx(1)


def test_each_failure_halves_the_rows(monkeypatch):
    network, O = make("coarse2fine"), image(90, 9)
    seen = watch(network, monkeypatch, most=40)
    staged(network, O)
    # 90, 45 and 22 rows; these with a halo of 12 above too, 11 of them; then to the end, where the halo is cut off.
    assert seen == [90, 57, 34, 46, 35, 35, 35, 35, 35, 25, 14]


@pytest.mark.parametrize("name", CASES)
def test_a_memory_too_small_for_the_least_rows_is_the_devices_error(name, monkeypatch):
    network = make(name)
    halo = network.halo
    seen = watch(network, monkeypatch, most=0)
    with pytest.raises(RuntimeError) as raised:
        staged(network, image(60, 9))
    assert raised.value is FULL
    # 60, 30, 15 and 8 rows; a network that can't be cut is tried once.
    rows = [60, *(min(60, rows + halo) for rows in (30, 15 // network.stride * network.stride, 8))] if halo else [60]
    assert seen == rows


def test_another_error_is_not_taken_for_a_full_memory(monkeypatch):
    network, error = make("coarse2fine"), RuntimeError("shape mismatch")
    seen = watch(network, monkeypatch, most=0, error=error)
    with pytest.raises(RuntimeError) as raised:
        staged(network, image(60, 9))
    assert raised.value is error
    assert seen == [60]


# ---------------------------------------------------------------- precision and gradients


@pytest.mark.parametrize("memory_gib", [0.0, 1e-6])
@pytest.mark.parametrize("name", CASES)
def test_bf16_is_near_float32(name, memory_gib):
    network, O = make(name), image(45, 30)
    wanted = plain(network, O)
    with devices.autocast("bf16", CPU):
        found = staged(network, O, memory_gib=memory_gib)
        assert {R.dtype for R in network(O[None])} == {torch.float32}
    assert found.dtype == torch.float32
    error = (found - wanted).abs().mean() / wanted.std()
    assert 0 < error < 0.01


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_checkpointed_activations_give_the_same_gradients(name, precision):
    network, O, calls = make(name).train(), image(20, 18)[None], []
    part = network.stage.block if name.startswith("coarse2fine") else network.pyramids
    part.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    found = []
    for checkpointed in (False, True):
        network.checkpoint_activations = checkpointed
        network.zero_grad()
        calls.clear()
        with devices.autocast(precision, CPU):
            rain_layers = network(O)
        sum(R.square().mean() for R in rain_layers).backward()
        stages = network.stage_num if name.startswith("coarse2fine") else 1
        assert len(calls) == (1 + checkpointed) * stages
        found.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
    assert (found[1] - found[0]).abs().max() < 1e-6 * max(1, found[0].abs().max())
    assert found[0].norm() > 0.01


def test_checkpointed_activations_are_not_kept():
    """The tensors that wait for the gradients: the blocks' are gone."""
    network, O, kept = make("coarse2fine").train(), image(20, 18)[None], []
    for network.checkpoint_activations in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            network(O)
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


# ---------------------------------------------------------------- cost


def coarse2fine_macs(stage_num, refined):
    c, L = 16, 4
    block = sum(l * c * c for l in range(2, L + 1)) + L * 9 * c * c + (L + 1) * c * c
    stage = 9 * 3 * c + block + 9 * c * 3
    return stage_num * stage + sum(3 * t * 3 for t in range(2, stage_num + 1)) + refined * 9 * (3 * c + c * c + c / 3)


def php_macs(first_level_input, pooling):
    half = 9 * 3 * 48 + 9 * 48 * (first_level_input + 3 * 48) + 4 * 2 * 9 * 48  # stem, levels, T of each
    return half / 4 + pooling + 9 * 48 * 16 + 16 * 3 + 9 * 3 * 16 + 3 * 9 * 16 * 16 + 16 * 3


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("coarse2fine_single", 13664),
        ("coarse2fine_single", coarse2fine_macs(1, False)),
        ("coarse2fine_s2", coarse2fine_macs(2, True)),
        ("coarse2fine", coarse2fine_macs(12, True)),
        ("php", 9_602_334_720 / 512**2),
        ("php", php_macs(51, 3 + 27)),
        ("php_max_pooling", php_macs(51, 0)),
        ("php_no_pooling", php_macs(48, 0)),
    ],
)
def test_multiply_accumulates_are_those_counted_by_hand(name, macs):
    network = model.build(name)
    assert network.macs_per_pixel() == macs
    assert not any(module._forward_hooks for module in network.modules())


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("preset", "value"),
    [
        ("php", {"use_se": False}),
        ("php", {"stage_num": 4}),
        ("php", {"dilated": False}),
        ("coarse2fine", {"link": "none"}),
        ("coarse2fine", {"pooling": "max"}),
        ("dsen", {"block": "parallel"}),
        ("sdsen", {"refined": False}),
    ],
)
def test_settings_of_another_network_are_refused(preset, value):
    settings = resolve(preset, value)
    (name,) = value
    with pytest.raises(BadArgument, match=name):
        model.build(settings)


@pytest.mark.parametrize(("preset", "loss"), [("dsen", "php"), ("coarse2fine", "php"), ("sdsen", "coarse2fine")])
def test_losses_of_another_network_are_refused(preset, loss):
    with pytest.raises(UserError, match=f"loss.* {loss}"):
        resolve(preset, {"loss": loss})


def test_a_refused_command_writes_nothing(tmp_path, data_dir):
    before = sorted(tmp_path.rglob("*"))
    places = [f"--{name}={tmp_path / name}" for name in ("model_dir", "log_dir")]
    with pytest.raises(BadArgument, match="use_se"):
        main.main(["-a", "train", "-p", "php", "--use_se", "false", f"--data_dir={data_dir}", *places])
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------- learning


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("coarse2fine", {"stage_num": 2, "depth": 3, "lr": 5e-3}),
        ("php", {"lowpass_sigma": 0.0, "lr": 2e-3}),
    ],
)
def test_two_crops_are_learnt_by_heart(name, values):
    """By the networks' own losses, coarse-to-fine's without VGG."""
    settings = resolve(name, {**values, "steps": 400, "epochs": 0, "schedule": "cosine", "vgg_weights": ""})
    pairs = ([to_tensor(half).float() / 255 for half in make_pair(32, 32, seed)] for seed in (1, 2))
    B, O = (torch.stack(halves) for halves in zip(*pairs, strict=True))
    torch.manual_seed(0)
    network, criterion = model.build(settings), losses.build(settings)
    optimizer = make_optimizer(network, settings.lr)
    scores = [cal_ssim.psnr(O, B)]
    for step in range(settings.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(settings, step)
        main.train_step(network, optimizer, O, B, settings, False, criterion)
    with torch.no_grad():
        scores.append(cal_ssim.psnr(O - network(O)[-1], B))
    assert scores[0].max() < 20
    assert scores[1].min() > 30


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("dsen", {"depth": 4}),
        ("sdsen_s2", {"depth": 4}),
        ("cnn", {"depth": 4}),
        ("coarse2fine", {"stage_num": 2, "depth": 2}),
        ("php", {}),
        ("php_non_local", {}),
    ],
)
def test_an_empty_batch_has_empty_rain_layers_and_an_empty_image_is_refused(name, values):
    network = model.build(resolve(name, values))
    for training in (True, False):
        empty = network.train(training)(torch.rand(0, 3, 12, 16))
        assert [tuple(R.shape) for R in empty] == [(0, 3, 12, 16)] * network.output_num
        sum(R.sum() for R in empty).backward()
    for shape in ((1, 3, 0, 16), (1, 3, 12, 0)):
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            network(torch.rand(shape))
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            next(rain_layers(network, torch.rand(shape)[0]))

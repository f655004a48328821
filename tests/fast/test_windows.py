"""Images in windows of rows against the forward pass: every network, any size, little memory, both precisions."""

import math

import pytest
import torch

import model
from base import devices
from fast import strips, windows
from fast.any_size import rain_layers
from settings import resolve

CPU = torch.device("cpu")
FULL = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried ...")
NETWORKS = ["sdsen_s2", "dsen", "mdsen_sc", "mcnn_sr", "dsen_maxpool", "dsen_wo_se"]


@pytest.fixture(autouse=True)
def no_strips(monkeypatch):
    monkeypatch.setattr(strips, "fit", lambda *_: False)


def make(preset="sdsen_s2", **values):
    settings = resolve(preset, {"channel": 4, "depth": 5, **values})
    torch.manual_seed(1)
    network = model.build(settings).eval()
    network.stage_num = min(settings.stage_num, 2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)  # larger rain layers than those of initial weights
    return network


@torch.no_grad()
def plain(network, O):
    return torch.stack([R[0] for R in network(O[None])])


@torch.no_grad()
def in_windows(network, O, memory_gib=0.0, tick=lambda share: None):
    return torch.stack(list(rain_layers(network, O, None, memory_gib, tick)))


def set_rows(monkeypatch, width, rows, least=1):
    """Lets windows of an image `width` pixels wide start with `rows` rows, and not fall below `least`."""
    monkeypatch.setattr(windows, "CPU_PIXELS", rows * width)
    monkeypatch.setattr(windows, "MIN_ROWS", least)


def watch(network, monkeypatch, most=math.inf, error=FULL):
    """A list of the rows that `network.features` gets in each call from now on; more than `most` raise `error`."""
    seen, features = [], network.features

    def watched(image, states):
        seen.append(image.shape[2])
        if image.shape[2] > most:
            raise error
        return features(image, states)

    monkeypatch.setattr(network, "features", watched)
    return seen


@pytest.mark.parametrize(("height", "width"), [(33, 21), (40, 26)])
@pytest.mark.parametrize("preset", NETWORKS)
def test_every_network_and_window_is_the_forward_pass(preset, height, width, monkeypatch):
    network, O = make(preset), torch.rand(3, height, width)
    wanted = plain(network, O)
    for rows in (1, 5, 16, height - 1, height):  # fewer than the halo's 8, more, and the whole image
        set_rows(monkeypatch, width, rows)
        with monkeypatch.context() as patch:
            seen = watch(network, patch)
            found = in_windows(network, O)
        ends = [(top, min(top + rows, height)) for top in range(0, height, rows)]
        assert seen == network.stage_num * [min(end + 8, height) - max(top - 8, 0) for top, end in ends]
        assert (found - wanted).abs().max() < 1e-5 * max(1, wanted.abs().max())


def test_a_full_memory_halves_the_windows(monkeypatch):
    network, O = make(), torch.rand(3, 60, 20)
    wanted = plain(network, O)
    set_rows(monkeypatch, 20, 60)
    seen = watch(network, monkeypatch, most=24)
    found = in_windows(network, O)
    assert (found - wanted).abs().max() < 1e-5
    # The whole; 30 rows with their halo of 8 below; 15 rows, of which the second window has a halo above too; 7 rows.
    assert seen[:4] == [60, 38, 23, 31]
    assert max(seen[4:]) == 7 + 2 * 8
    assert len(seen) == 4 + math.ceil(45 / 7) + math.ceil(60 / 7)


def test_a_memory_that_fills_in_the_second_stage_halves_the_windows(monkeypatch):
    """The states of the first stage were written in larger windows than the second stage reads and writes."""
    network, O = make("mdsen_sc"), torch.rand(3, 50, 20)
    wanted = plain(network, O)
    set_rows(monkeypatch, 20, 20)
    seen, features = [], network.features

    def features_of_little(image, states):
        seen.append(image.shape[2])
        if len(seen) > 4 and image.shape[2] > 26:
            raise FULL
        return features(image, states)

    monkeypatch.setattr(network, "features", features_of_little)
    assert (in_windows(network, O) - wanted).abs().max() < 1e-5
    assert seen == [28, 36, 18, 28, 36, 26, 26, 18]


def test_a_memory_too_small_for_the_least_rows_is_the_devices_error(monkeypatch):
    network = make()
    set_rows(monkeypatch, 20, 60, least=8)
    seen = watch(network, monkeypatch, most=0)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        in_windows(network, torch.rand(3, 60, 20))
    assert seen == [60, 38, 23, 16]  # 60, 30, 15 and 8 rows with the halo below
    del seen[:]
    with pytest.raises(torch.cuda.OutOfMemoryError):
        in_windows(network, torch.rand(3, 8, 20))
    assert seen == [8]


@pytest.mark.parametrize("rows", [60, 20])
def test_another_error_is_not_taken_for_a_full_memory(rows, monkeypatch):
    network, error = make(), RuntimeError("shape mismatch")
    set_rows(monkeypatch, 20, rows)
    seen = watch(network, monkeypatch, most=0, error=error)
    with pytest.raises(RuntimeError) as raised:
        in_windows(network, torch.rand(3, 60, 20))
    assert raised.value is error
    assert len(seen) == 1


@pytest.mark.parametrize("rows", [60, 20, 7])
def test_ticks_add_up_to_the_whole_work(rows, monkeypatch):
    network, shares = make(), []
    set_rows(monkeypatch, 20, rows)
    in_windows(network, torch.rand(3, 60, 20), tick=shares.append)
    assert sum(shares) == pytest.approx(1)
    assert len(shares) == (1 if rows == 60 else 2 * math.ceil(60 / rows))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_states_in_a_file_give_the_same_bits(precision, monkeypatch):
    network, O = make(), torch.rand(3, 45, 30)
    set_rows(monkeypatch, 30, 10)
    budgets, zeros = [], windows.MemoryBudget.zeros
    monkeypatch.setattr(
        windows.MemoryBudget,
        "zeros",
        lambda budget, *s, dtype: budgets.append(budget) or zeros(budget, *s, dtype=dtype),
    )
    with devices.autocast(precision, CPU):
        in_memory = in_windows(network, O)
        assert not budgets[-1].mapped
        in_files = in_windows(network, O, memory_gib=1e-6)
    # The aggregated features, and the states of both layers.
    assert len(budgets[-1].mapped) == 3
    assert torch.equal(in_files, in_memory)


def test_bf16_is_near_float32(monkeypatch):
    """Of all samples but one in a thousand, the error is less than one of 255 levels; half of that was measured."""
    torch.manual_seed(2)
    network, O = model.build("sdsen_s2").eval(), torch.rand(3, 60, 50)
    set_rows(monkeypatch, 50, 16)
    wanted = plain(network, O)
    with devices.autocast("bf16", CPU):
        found = in_windows(network, O)
        whole = plain(network, O)
    assert found.dtype == torch.float32
    assert 0 < (found - wanted).abs().quantile(0.999) < 1 / 255
    # Windows add nothing to the error of the precision; where a sum is rounded may depend on the number of threads.
    assert (found - wanted).abs().mean() < 1.1 * (whole - wanted).abs().mean()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_an_image_too_large_for_cuda(precision, monkeypatch):
    device = devices.pick_device("cuda")
    network, O = model.build("sdsen_s2").eval().to(device), torch.rand(3, 1500, 1000, device=device)
    with devices.autocast(precision, device):
        wanted = plain(network, O).cpu()
        devices.empty_cache(device)
        _, total = torch.cuda.mem_get_info(device)
        # Of the 1500 rows at once, the states of one stage alone take 960 MB in float32.
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + 400e6) / total, device)
        try:
            seen = watch(network, monkeypatch)
            found = in_windows(network, O).cpu()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert seen[0] == 1500
    assert max(seen[-4:]) < 1500
    assert (found - wanted).abs().max() < (1e-4 if precision == "float32" else 1e-2)  # cuDNN may go several ways

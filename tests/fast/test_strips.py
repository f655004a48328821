"""Images in strips of rows against the forward pass in float64: every network, any size, in memory or in files."""

import copy

import pytest
import torch

import model
from fast import strips, winograd
from fast.any_size import rain_layers
from presets import PRESETS

pytestmark = pytest.mark.skipif(winograd.library() is None, reason="no C++ compiler")
OTHERS = ("cnn_da", "cnn_c4da", "sdsen_s2", "sdsen_s6", "sdsen", "mcnn")  # like one of the rest
NETWORKS = [name for name, preset in PRESETS.items() if name not in OTHERS and "network" not in preset.differences]


def make(preset: str, stage_num: int):
    torch.manual_seed(1)
    network = model.build(preset).eval()
    network.stage_num = min(stage_num, network.stage_num)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)  # larger rain layers than those of initial weights
    return network


def plain(network, O):
    with torch.no_grad():
        return [R[0] for R in copy.deepcopy(network).double()(O[None].double())]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 9), (16, 24), (33, 21)])
@pytest.mark.parametrize("preset", NETWORKS)
def test_every_network_and_size(preset, height, width, monkeypatch):
    network, O = make(preset, 3), torch.rand(3, height, width)
    assert strips.fit(network, O)
    wanted = plain(network, O)
    for strip_tiles in (1, 16, 512):  # strips of one row of tiles, of some, and the whole image
        monkeypatch.setattr(strips, "STRIP_TILES", strip_tiles)
        for R, other in zip(rain_layers(network, O), wanted, strict=True):
            assert R.shape == (3, height, width)
            assert (R - other).abs().max() < 1e-5 * max(1, other.abs().max())


def test_eight_stages(monkeypatch):
    network, O = make("sdsen", 8), torch.rand(3, 71, 50)
    monkeypatch.setattr(strips, "STRIP_TILES", 60)
    assert (list(rain_layers(network, O))[-1] - plain(network, O)[-1]).abs().max() < 1e-5


def test_states_in_a_file_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(strips, "STRIP_TILES", 30)
    network, O = make("sdsen_s4", 3), torch.rand(3, 50, 41)
    budgets, zeros = [], strips.MemoryBudget.zeros
    monkeypatch.setattr(
        strips.MemoryBudget, "zeros", lambda budget, *shape: budgets.append(budget) or zeros(budget, *shape)
    )
    in_memory = torch.stack(list(rain_layers(network, O)))
    assert not budgets[-1].mapped
    in_files = torch.stack(list(rain_layers(network, O, memory_gib=1e-6)))
    assert len(budgets[-1].mapped) == 2
    assert torch.equal(in_files, in_memory)

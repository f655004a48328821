"""Images in strips of rows against the forward pass in float64: every network, any size, in memory or in files."""

import copy

import pytest
import torch

import model
from fast import strips
from presets import PRESETS

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


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 9), (16, 24), (33, 21), (45, 60)])
@pytest.mark.parametrize("preset", NETWORKS)
def test_every_network_and_size(preset, height, width, monkeypatch):
    network, O = make(preset, 3), torch.rand(3, height, width)
    wanted = plain(network, O)
    for chunk in (1, 40, 512):  # strips of one row of tiles, of some, and the whole image
        monkeypatch.setattr(strips, "CHUNK", chunk)
        found = list(network.each_stage(O))
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert one.shape == (3, height, width)
            assert (one - other).abs().max() < 1e-5 * max(1, other.abs().max())


def test_eight_stages_with_and_without_strips(monkeypatch):
    network, O = make("sdsen", 8), torch.rand(3, 71, 50)
    whole = plain(network, O)[-1]
    monkeypatch.setattr(strips, "CHUNK", 60)
    in_strips = list(network.each_stage(O))[-1]
    assert (in_strips - whole).abs().max() < 1e-5


def test_states_in_a_file_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(strips, "CHUNK", 30)
    network, O = make("sdsen_s4", 3), torch.rand(3, 50, 41)
    mapped = []
    zeros = strips.Room.zeros
    monkeypatch.setattr(strips.Room, "zeros", lambda room, *shape: mapped.append(room) or zeros(room, *shape))
    in_memory = torch.stack(list(network.each_stage(O)))
    assert not mapped[-1].mapped
    in_files = torch.stack(list(network.each_stage(O, memory_gib=1e-6)))
    assert len(mapped[-1].mapped) == 2
    assert torch.equal(in_files, in_memory)


def test_fewer_and_more_stages_than_the_networks():
    network, O = make("sdsen_s4", 4), torch.rand(3, 20, 20)
    stages = list(network.each_stage(O, 6))
    assert len(stages) == 6
    for count in (1, 3):
        last = list(network.each_stage(O, count))[-1]
        assert torch.equal(last, stages[count - 1])


def test_ticks_add_up_to_the_whole_work():
    shares = []
    list(make("sdsen_s4", 2).each_stage(torch.rand(3, 100, 30), 2, tick=shares.append))
    assert sum(shares) == pytest.approx(1)
    assert len(shares) >= 2


def test_other_precisions_and_devices_go_through_forward(monkeypatch):
    monkeypatch.setattr(strips, "each_stage", None)
    network, O = make("sdsen_s4", 2).double(), torch.rand(3, 9, 11, dtype=torch.float64)
    shares = []
    stages = list(network.each_stage(O, tick=shares.append))
    assert torch.equal(stages[-1], network(O[None])[-1][0])
    assert shares == [0.5, 0.5]

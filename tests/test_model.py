"""The networks: the published outputs, the paper's parameter counts, equivariance, any size, links between stages."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
from conftest import GOLDEN
from convolution import FilterKeeper
from model import DSEN, build, count_parameters, macs_per_pixel
from presets import PRESETS
from test_groupy import turn

PARAMETERS = {
    "dsen": 50958,
    "dsen_maxpool": 40948,
    "dsen_avgpool": 40948,
    "dsen_wo_se": 50843,
    "cnn": 52113,
    "cnn_da": 52113,
    "cnn_c4da": 52113,
    "mcnn": 52113,
    "mcnn_sr": 132193,
    "mdsen": 50958,
    "mdsen_sc": 90998,
    "sdsen": 130998,
    "sdsen_s2": 130998,
    "sdsen_s4": 130998,
    "sdsen_s6": 130998,
}


def small(seed=0, **arguments):
    torch.manual_seed(seed)
    return DSEN(**{"channel": 3, "depth": 5, **arguments}).double().eval()


def published(name, dtype=torch.float32):
    arrays = np.load(GOLDEN / f"{name}.npz")
    network = build(name)
    network.load_state_dict(
        {key.removeprefix("state/"): torch.tensor(arrays[key]) for key in arrays.files if key.startswith("state/")}
    )
    return network, torch.tensor(arrays["input"]), torch.tensor(arrays["output"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "stages"), [("dsen", 1), ("sdsen", 8)])
def test_published_outputs_at_every_stage(name, stages, training, device):
    network, O, expected = published(name)
    network.train(training).to(device)
    with torch.set_grad_enabled(training):
        rain_layers = network(O.to(device))
    assert len(rain_layers) == stages
    for R, reference in zip(rain_layers, expected, strict=True):
        assert (R.cpu() - reference).abs().max() < 1e-5


@pytest.mark.parametrize(("name", "stages"), [("dsen", 1), ("sdsen", 8)])
def test_published_outputs_one_stage_after_another(name, stages, device):
    network, O, expected = published(name)
    rain_layers = list(network.eval().to(device).each_stage(O[0].to(device)))
    assert len(rain_layers) == stages
    for R, reference in zip(rain_layers, expected, strict=True):
        assert (R.cpu() - reference[0]).abs().max() < 1e-5


@pytest.mark.parametrize("group", ["p4", "z2"])
def test_filters_are_made_once_for_all_stages_gradients_included(group, monkeypatch):
    network = small(stage_num=3, link="concat", group=group)
    layers = [module for module in network.modules() if isinstance(module, FilterKeeper)]
    assert len(layers) == 1 + 2 + 2 + 1
    made = []
    for layer in layers:
        make = layer.make_filters
        monkeypatch.setattr(layer, "make_filters", lambda layer=layer, make=make: made.append(layer) or make())
    network.train()
    network(torch.rand(1, 3, 8, 8, dtype=torch.float64))[-1].sum().backward()
    assert len(made) == len(set(made)) == len(layers)


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_are_the_papers(name):
    assert count_parameters(build(name)) == PARAMETERS[name]


def test_cost_of_sdsen():
    assert macs_per_pixel(build("sdsen")) == 8 * 493030  # 0.49 MMAC a pixel and stage
    assert macs_per_pixel(build("cnn")) == 52113 - (4 * 20 + 20 + 20 + 430 + 3)  # weights of the convolutions


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_maps_any_size_and_learns(name):
    torch.manual_seed(3)  # with some seeds the SE block's ReLU passes nothing at first, and its layer has no gradient
    network = build(name)
    O = torch.rand(2, 3, 9, 14)
    rain_layers = network(O, 2)
    assert [R.shape for R in rain_layers] == [O.shape] * 2
    sum(R.square().mean() for R in rain_layers).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())
    assert network(torch.rand(1, 3, 1, 1))[-1].shape == (1, 3, 1, 1)


@pytest.mark.parametrize("name", ["dsen", "sdsen_s2", "mdsen_sc"])
def test_symmetry_enhanced_block_is_equivariant(name):
    """The states of all layers and stages turn with the image; the aggregation convolution behind them does not."""
    torch.manual_seed(0)
    network = build(name).double().eval()
    O = torch.rand(1, 3, 11, 8, dtype=torch.float64)
    nothing = [None] * len(network.re_layer)
    _, states = network.stage(O, nothing)
    _, states = network.stage(O, states)
    for r in range(4):
        turned = torch.rot90(O, r, (-2, -1))
        _, turned_states = network.stage(turned, nothing)
        _, turned_states = network.stage(turned, turned_states)
        for state, turned_state in zip(states, turned_states, strict=True):
            assert (turn(state, r) - turned_state).abs().max() < 1e-10


@pytest.mark.parametrize("aggregation", ["max", "mean"])
def test_orientation_pooling_makes_the_whole_network_equivariant(aggregation):
    network = small(aggregation=aggregation, stage_num=2, link="concat")
    O = torch.rand(1, 3, 9, 7, dtype=torch.float64)
    for r in range(4):
        for R, turned in zip(network(O), network(torch.rot90(O, r, (-2, -1))), strict=True):
            assert (torch.rot90(R, r, (-2, -1)) - turned).abs().max() < 1e-10


def test_aggregation_convolution_is_not_equivariant():
    network = small()
    O = torch.rand(1, 3, 9, 9, dtype=torch.float64)
    assert (torch.rot90(network(O)[0], 1, (-2, -1)) - network(torch.rot90(O, 1, (-2, -1)))[0]).abs().max() > 1e-4


@pytest.mark.parametrize("group", ["p4", "z2"])
@pytest.mark.parametrize("link", ["concat", "add"])
def test_stage_1_starts_from_zero_states_through_the_connection(link, group):
    network = small(link=link, group=group, channel=4)
    O = torch.rand(1, 3, 10, 10, dtype=torch.float64)
    shape = (1, 4, 4, 10, 10) if group == "p4" else (1, 4, 10, 10)
    zeros = [torch.zeros(shape, dtype=torch.float64)] * len(network.re_layer)
    R, _ = network.stage(O, zeros)
    assert (network(O)[0] - R).abs().max() < 1e-12
    torch.nn.init.zeros_(network.connect_layers[0].conv0.bias)
    assert (network(O)[0] - R).abs().max() > 1e-4  # the constant is not nothing


def test_stages_get_the_original_less_the_last_rain_layer():
    network = small(link="none", stage_num=3)
    O = torch.rand(1, 3, 10, 10, dtype=torch.float64)
    R1, R2, R3 = network(O)
    assert (network(O - R1)[0] - R2).abs().max() < 1e-12
    assert (network(O - R2)[0] - R3).abs().max() < 1e-12


def test_added_link_is_part_of_the_layers_input():
    network = small(link="add", depth=4)
    state = [torch.rand(1, 3, 4, 6, 6, dtype=torch.float64)]
    O = torch.rand(1, 3, 6, 6, dtype=torch.float64)
    _, (new_state,) = network.stage(O, state)
    x = network.pre_layer(O) + network.connect_layers[0](state[0])
    assert (F.leaky_relu(network.re_layer[0](x) + x, model.SLOPE) - new_state).abs().max() < 1e-12


def test_fewer_stages_are_the_first_ones():
    network = small(link="concat", stage_num=3)
    O = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    for R, other in zip(network(O, 2), network(O)[:2], strict=True):
        assert torch.equal(R, other)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 4, 8, 8)])
def test_images_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"expects rainy images of shape \(N, 3, H, W\)"):
        small()(torch.zeros(shape))

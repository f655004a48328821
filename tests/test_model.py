"""The networks: the published outputs, the paper's parameter counts, equivariance, any size, links between stages."""

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch.torch_version import TorchVersion

import model
from base.devices import autocast
from conftest import GOLDEN
from fast.any_size import rain_layers
from fast.convolution import FilterLayer
from model import DSEN, build, count_parameters
from presets import PRESETS
from settings import resolve
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
    "coarse2fine": 17305,
    "coarse2fine_no_dilation": 17305,
    "coarse2fine_no_inner_dense": 13705,
    "coarse2fine_no_outer_dense": 16579,
    "coarse2fine_no_all_dense": 12979,
    "coarse2fine_no_refinement": 14486,
    "coarse2fine_single": 13760,
    **{f"coarse2fine_s{T}": 16579 + sum(9 * t + 3 for t in range(2, T + 1)) for T in range(2, 17) if T != 12},
    "coarse2fine_57k": 57186,
    "coarse2fine_150k": 150727,
    **dict.fromkeys(("php", "php_acc", "php_acc_col", "php_unfiltered", "php_wo_s", "php_wo_m", "php_wo_l"), 104086),
    **dict.fromkeys(("php_standard", "php_parallel", "php_hierarchical", "php_concatenation"), 100246),
    "php_non_local": 36226,
    "php_no_pooling": 102758,
    "php_max_pooling": 104054,
    "php_one_network": 96627,
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


@pytest.mark.parametrize("group", ["p4", "z2"])
def test_filters_are_made_once_for_all_stages_gradients_included(group, monkeypatch):
    network = small(stage_num=3, link="concat", group=group)
    layers = [module for module in network.modules() if isinstance(module, FilterLayer)]
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
    assert build("sdsen").macs_per_pixel() == 8 * 493030  # 0.49 MMAC a pixel and stage
    assert build("cnn").macs_per_pixel() == 52113 - (4 * 20 + 20 + 20 + 430 + 3)  # weights of the convolutions


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_maps_any_size_and_learns(name):
    torch.manual_seed(3)  # with some seeds the SE block's ReLU passes nothing at first, and its layer has no gradient
    network = build(name)
    O = torch.rand(2, 3, 9, 14)
    stages = 2 if isinstance(network, DSEN) else network.output_num
    rain_layers = network(O, stages)
    assert [R.shape for R in rain_layers] == [O.shape] * stages
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
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        small()(torch.zeros(shape))


# ---------------------------------------------------------------- ways to train


CPU = torch.device("cpu")


def reduced(preset, stage_num=4):
    """A network in float32 and training mode, small, but with enough channels for the compiled library."""
    torch.manual_seed(0)
    return build(resolve(preset, {"channel": 8, "depth": 5, "stage_num": stage_num})).train()


def rain_layers_and_gradients(network, precision="float32"):
    network.zero_grad()
    with autocast(precision, CPU):
        rain_layers = network(torch.rand(2, 3, 24, 20, generator=torch.Generator().manual_seed(1)))
    sum(R.square().mean() for R in rain_layers).backward()
    return torch.stack(rain_layers).detach(), torch.cat([p.grad.flatten() for p in network.parameters()])


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("preset", ["sdsen_s2", "mcnn_sr"])
def test_checkpointed_stages_give_the_same_bits(preset, precision):
    network = reduced(preset)
    R, gradient = rain_layers_and_gradients(network, precision)
    network.checkpoint_activations = True
    again, same_gradient = rain_layers_and_gradients(network, precision)
    assert torch.equal(again, R)
    assert torch.equal(same_gradient, gradient)
    assert gradient.norm() > 0


def kept_bytes(network, precision, monkeypatch):
    """What a forward pass keeps for the gradients, besides the parameters; a stage's inputs are among it."""
    parameters = {parameter.data_ptr() for parameter in network.parameters()}
    kept, stage = {}, network.stage

    def keep(x):
        if x.data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x  # held, so that no other storage gets its address
        return x

    def watched(image, states):  # checkpoint holds a stage's inputs outside of autograd's sight
        for x in (image, *states):
            if x is not None:
                keep(x)
        return stage(image, states)

    with monkeypatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        patch.setattr(network, "stage", watched)
        with autocast(precision, CPU):
            network(torch.rand(2, 3, 24, 20))
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize(("precision", "most"), [("float32", 0.25), ("bf16", 0.15)])
def test_checkpointed_stages_keep_less(precision, most, monkeypatch):
    network = reduced("sdsen_s4")
    whole = kept_bytes(network, precision, monkeypatch)
    network.checkpoint_activations = True
    assert kept_bytes(network, precision, monkeypatch) < most * whole


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield torch._dynamo.testing.CompileCounter()  # a compiler that compiles nothing, and counts
    torch._dynamo.reset()


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.5", reason="main.py does not compile with PyTorch 2.4")
@pytest.mark.slow
@pytest.mark.parametrize(("precision", "checkpointed"), [("float32", False), ("bf16", True)])
@pytest.mark.parametrize("preset", ["sdsen_s2", "mcnn_sr"])
def test_a_compiled_network_is_the_same_one(preset, checkpointed, precision, counter):
    network = reduced(preset)
    R, gradient = rain_layers_and_gradients(network, precision)
    network.checkpoint_activations = checkpointed
    network.compile(backend=counter)
    for _ in range(3):
        compiled_R, compiled_gradient = rain_layers_and_gradients(network, precision)
        assert (compiled_R - R).abs().max() < 1e-5
        # Compiled code convolves directly, not by Winograd's method.
        assert (compiled_gradient - gradient).norm() < 1e-4 * gradient.norm()
    assert 1 <= counter.frame_count <= 2  # the first stage, which has no states, and all others


def test_evaluation_is_not_compiled(counter):
    network, O = reduced("sdsen_s2").eval(), torch.rand(1, 3, 12, 9)
    with torch.no_grad():
        wanted = network(O)
        network.compile(backend=counter)
        for R, other in zip(network(O), wanted, strict=True):
            assert torch.equal(R, other)
        list(rain_layers(network, O[0]))
    assert counter.frame_count == 0


def test_bf16_is_of_the_middle_of_a_stage_alone():
    """Of 255 levels, rain layers differ by less than one; the two ends of a stage compute in float32."""
    torch.manual_seed(0)
    network = build("sdsen_s2")
    ends = [network.pre_layer.conv0, network.dec[1].fc, network.dec[3]]
    middle = [*network.re_layer, *(connection.conv0 for connection in network.connect_layers), network.dec[0]]
    found = {module: set() for module in (*ends, *middle)}
    for module, dtypes in found.items():
        module.register_forward_hook(lambda _, inputs, output, dtypes=dtypes: dtypes.add(output.dtype))
    network.dec[3].register_forward_hook(lambda _, inputs, output: found[network.dec[3]].add(inputs[0].dtype))
    O = torch.rand(1, 3, 40, 30)
    with autocast("bf16", CPU):
        in_bf16 = torch.stack(network(O))
    assert [found[module] for module in ends] == [{torch.float32}] * len(ends)
    assert [found[module] for module in middle] == [{torch.bfloat16}] * len(middle)
    assert in_bf16.dtype == torch.float32
    assert 0 < (in_bf16 - torch.stack(network(O))).abs().quantile(0.999) < 1 / 255

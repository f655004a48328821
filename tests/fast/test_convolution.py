"""Filters made once per pass and never kept; 16-bit convolutions; constant channels; second-order gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

import losses
import main
import model
from base.devices import autocast
from fast import convolution
from fast.any_size import rain_layers
from fast.convolution import Filters, SharedConv2d, conv2d, filters_of, shared_filters
from model import P4ConvP4, P4ConvZ2
from settings import resolve

CPU = torch.device("cpu")
CHANNELS_LAST = torch.channels_last


def small(preset="sdsen_s2", **changes):
    torch.manual_seed(0)
    return model.build(resolve(preset, {"channel": 8, "depth": 5, **changes}))


def image(height=20, width=24, number=1):
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- never stale


def step(network, **options):
    optimizer = torch.optim.Adam(network.parameters(), 1e-2, **options)
    network(image())[-1].square().mean().backward()
    optimizer.step()


def average(network):
    """As BasicSR's exponential moving average does it."""
    other = copy.deepcopy(network)
    step(other)
    for mine, theirs in zip(network.parameters(), other.parameters(), strict=True):
        mine.data.mul_(0.5).add_(theirs.data, alpha=0.5)


def swa(network):
    other = copy.deepcopy(network)
    step(other)
    averaged = torch.optim.swa_utils.AveragedModel(network)
    averaged.module = network
    averaged.update_parameters(other)
    averaged.update_parameters(small())


def changed_state(network):
    return {name: tensor * 1.5 for name, tensor in network.state_dict().items()}


@torch.no_grad()
def copy_in_place(network):
    for parameter in network.parameters():
        parameter.copy_(parameter * 1.5)


def through_numpy(network):
    for parameter in network.parameters():
        parameter.detach().numpy()[...] *= 1.5


def with_weight_norm(network):
    torch.nn.utils.parametrizations.weight_norm(network.re_layer[1])
    network(image())
    with torch.no_grad():
        network.re_layer[1].parametrizations.weight.original0.mul_(3.0)


CHANGES = {
    "fused Adam": lambda network: step(network, fused=True),
    "foreach Adam": lambda network: step(network, foreach=True),
    "data": lambda network: [p.data.mul_(1.5) for p in network.parameters()],
    "another data": lambda network: [setattr(p, "data", p.data * 1.5) for p in network.parameters()],
    "copy_": copy_in_place,
    "numpy": through_numpy,
    "moving average": average,
    "AveragedModel": swa,
    "load_state_dict, assign": lambda network: network.load_state_dict(changed_state(network), assign=True),
    "weight_norm": with_weight_norm,
    "vector": lambda network: torch.nn.utils.vector_to_parameters(
        1.5 * torch.nn.utils.parameters_to_vector(network.parameters()), network.parameters()
    ),
}


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("precision", ["float32", "bf16"])  # in strips and in windows
@pytest.mark.parametrize("change", CHANGES)
def test_outputs_follow_the_weights_however_they_change(change, precision, guard):
    network, O = small().eval(), image()
    layer, x = P4ConvP4(2, 2, 5, padding=2).eval(), torch.rand(1, 2, 4, 8, 8)

    def outputs(network, layer):
        with guard(), autocast(precision, CPU):
            return network(O)[-1].clone(), list(rain_layers(network, O[0]))[-1].clone(), layer(x).clone()

    before = outputs(network, layer)
    CHANGES[change](network)
    layer.weight.data.mul_(2.0)
    after = outputs(network, layer)
    for old, new, fresh in zip(before, after, outputs(copy.deepcopy(network), copy.deepcopy(layer)), strict=True):
        assert torch.equal(new, fresh)
        assert (new - old).abs().max() > 1e-4


def test_functional_call_takes_the_weights_that_it_is_given():
    network, other = small().eval(), small().eval()
    copy_in_place(other)
    with torch.no_grad():
        network(image())
        found = torch.func.functional_call(network, dict(other.named_parameters()), (image(),))
        assert torch.equal(found[-1], other(image())[-1])


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.5", reason="main.py does not compile with PyTorch 2.4")
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_nothing_outlives_a_compiled_pass(precision):
    network = small().train()
    torch._dynamo.reset()
    network.compile(backend="eager")
    with autocast(precision, CPU):
        network(image())[-1].sum().backward()
    torch._dynamo.reset()
    layers = [module for module in network.modules() if isinstance(module, convolution.FilterLayer)]
    assert len(layers) == 6
    assert {layer.shared for layer in layers} == {None}


# ---------------------------------------------------------------- second-order gradients


def penalty_gradients(network, O, precision="float32"):
    """Gradients of a penalty on the gradient with respect to the image, of every parameter."""
    O = O.clone().requires_grad_()
    with autocast(precision, CPU):
        rain_layers = network(O)
    (gradient,) = torch.autograd.grad(rain_layers[-1].square().sum(), O, create_graph=True)
    return torch.autograd.grad((gradient.norm() - 1).square(), list(network.parameters()), allow_unused=True)


@pytest.mark.parametrize("preset", ["sdsen_s2", "mcnn_sr", "mdsen_sc"])
def test_second_order_gradients_are_those_of_float64(preset):
    network = small(preset, stage_num=2)
    found = penalty_gradients(network, image())
    wanted = penalty_gradients(network.double(), image().double())
    compared = 0
    for one, other in zip(found, wanted, strict=True):
        if other is not None and other.dim() > 1 and other.norm() > 1e-6:
            assert (one - other).norm() < 1e-3 * other.norm()
            compared += 1
    assert compared > 6


def test_second_order_gradients_in_16_bits_are_near():
    network = small()
    found, wanted = penalty_gradients(network, image(), "bf16"), penalty_gradients(network, image())
    for one, other in zip(found, wanted, strict=True):
        if other is not None and other.dim() == 5:
            assert (one - other).norm() < 0.1 * other.norm()


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_second_order_gradients_of_checkpointed_stages_are_the_same(precision):
    network = small()
    wanted = penalty_gradients(network, image(), precision)
    network.checkpoint_activations = True
    for one, other in zip(penalty_gradients(network, image(), precision), wanted, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_functional_transforms_take_gradients_of_gradients():
    network, O = small(), image(9, 8)
    parameters = dict(network.named_parameters())

    def energy(weight, x):
        return torch.func.functional_call(network, {**parameters, "re_layer.0.weight": weight}, (x,))[-1].square().sum()

    def squared_slope(weight, x):
        return torch.func.grad(energy, argnums=1)(weight, x).square().sum()

    weight = parameters["re_layer.0.weight"].detach()
    found = torch.func.grad(squared_slope)(weight, O)
    network.double()
    parameters = dict(network.named_parameters())
    wanted = torch.func.grad(squared_slope)(weight.double(), O.double())
    assert (found - wanted).norm() < 1e-3 * wanted.norm()


# ---------------------------------------------------------------- constant channels


SIZES = [(1, 1), (2, 9), (3, 4), (4, 5), (5, 5), (6, 5), (13, 7)]


@pytest.mark.parametrize("size", SIZES)
def test_constant_channels_are_those_of_an_image_full_of_them(size):
    torch.manual_seed(0)
    filters = torch.randn(4, 7, 5, 5, dtype=torch.float64, requires_grad=True)
    bias, constant = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (4, 3))
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    leaves = (filters, bias, constant, x)
    y = conv2d([x], Filters(filters, bias), padding=2, constant=constant)
    full = constant[:, None, None].expand(2, 3, *size)
    expected = F.conv2d(torch.cat([x, full], 1), filters, bias, padding=2)
    assert (y - expected).abs().max() < 1e-12
    gradient = torch.randn_like(y)
    pairs = zip(*(torch.autograd.grad(out, leaves, gradient) for out in (y, expected)), strict=True)
    assert all((one - other).abs().max() < 1e-10 for one, other in pairs)


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("layer", [P4ConvP4(16, 8, 5, padding=2), SharedConv2d(16, 8, 5, padding=2)])
def test_a_layer_with_constant_channels_within_a_pass(layer, precision):
    torch.manual_seed(0)
    x = torch.rand(2, 8, 4, 9, 11) if isinstance(layer, P4ConvP4) else torch.rand(2, 8, 9, 11)
    constant = torch.rand(8)
    full = constant.view(1, 8, *[1] * (x.dim() - 2)).expand_as(x)
    with autocast(precision, CPU), shared_filters(filters_of(layer)):
        found, wanted = layer(x, constant=constant), layer(x, full)
    assert (found - wanted).abs().max() < (2e-5 if precision == "float32" else 2e-2)


def test_constants_that_do_not_fit():
    with pytest.raises(ValueError, match="P4ConvP4"):
        P4ConvP4(4, 2, 5, padding=2)(torch.zeros(1, 2, 4, 8, 8), constant=torch.zeros(1))


# ---------------------------------------------------------------- 16 bits


def in_16_bits(inputs, filters, bias, dtype):
    with torch.autocast("cpu", dtype):
        return conv2d(inputs, Filters(filters, bias, shared=True), padding=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [(40,), (40, 40)])
@pytest.mark.parametrize("padded", [False, True])
def test_a_16_bit_convolution_and_its_gradients(channels, padded, dtype, monkeypatch):
    """Padded results leave outputs as they are; both have the gradients of PyTorch's convolution."""
    if padded:
        monkeypatch.setattr(convolution, "padded_outputs", lambda channels, *_: channels + 24)
    torch.manual_seed(0)
    inputs = [torch.randn(2, count, 9, 12).to(dtype).requires_grad_() for count in channels]
    filters = (torch.randn(40, sum(channels), 5, 5) * 0.03).requires_grad_()
    bias = torch.randn(40, requires_grad=True)
    leaves = (*inputs, filters, bias)
    y = in_16_bits(inputs, filters, bias, dtype)
    assert (y.shape, y.dtype) == ((2, 40, 9, 12), dtype)
    gradient = torch.randn(y.shape).to(dtype)
    found = torch.autograd.grad(y, leaves, gradient)
    exact = F.conv2d(torch.cat(inputs, 1).double(), filters.double(), bias.double(), padding=2)
    wanted = torch.autograd.grad(exact, leaves, gradient.double())
    epsilon = torch.finfo(dtype).eps
    assert (y - exact).abs().max() < 4 * epsilon * exact.abs().max()
    for one, other, leaf in zip(found, wanted, leaves, strict=True):
        assert (one.shape, one.dtype) == (leaf.shape, leaf.dtype)
        assert (one.double() - other).norm() < 2 * epsilon * other.double().norm()


@pytest.mark.parametrize("channels", [(10,), (20, 20)])
def test_padding_leaves_outputs_and_gradients_as_they_are(channels):
    torch.manual_seed(0)
    inputs = [torch.randn(2, count, 9, 12, requires_grad=True) for count in channels]
    filters = (torch.randn(10, sum(channels), 5, 5) * 0.05).requires_grad_()
    bias, gradient = torch.randn(10, requires_grad=True), torch.randn(2, 10, 9, 12)
    leaves = (*inputs, filters, bias)
    padded = F.pad(filters.detach(), (0, 0, 0, 0, 0, 0, 0, 22))
    y = convolution.HalfConvolution.apply(padded, filters, bias, *inputs)
    expected = F.conv2d(torch.cat(inputs, 1), filters, bias, padding=2)
    assert (y - expected).abs().max() < 1e-5
    pairs = zip(*(torch.autograd.grad(out, leaves, gradient) for out in (y, expected)), strict=True)
    assert all((one - other).norm() < 1e-5 * other.norm() for one, other in pairs)


def test_gradients_of_several_passes_add_up_in_float32():
    torch.manual_seed(0)
    x, filters = torch.randn(1, 8, 6, 6), torch.randn(8, 8, 5, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        shared = Filters(filters, None, shared=True)
        (once,) = torch.autograd.grad(conv2d([x], shared, padding=2).sum(), filters)
        (often,) = torch.autograd.grad(sum(conv2d([x], shared, padding=2).sum() for _ in range(300)), filters)
    assert (often / 300 - once).abs().max() < 1e-5 * once.abs().max()  # bfloat16 stands still at 256


def test_padding_is_for_16_bits_on_hopper(cards):
    cards((8, 0), (9, 0), (12, 0))
    ampere, hopper, blackwell = (torch.device("cuda", index) for index in range(3))
    for dtype in (torch.bfloat16, torch.float16):
        padded = [convolution.padded_outputs(n, dtype, hopper) for n in (10, 20, 32, 33, 40, 63, 64, 80)]
        assert padded == [10, 20, 32, 64, 64, 64, 64, 80]
        assert {convolution.padded_outputs(40, dtype, device) for device in (ampere, blackwell, CPU)} == {40}
    assert convolution.padded_outputs(40, torch.float32, hopper) == 40


class Formats(TorchDispatchMode):
    """The images, filters and gradients of all convolutions that are not in channels-last memory."""

    def __init__(self):
        super().__init__()
        self.seen, self.others = 0, []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        if name in ("convolution", "convolution_backward"):
            tensors = [x for x in arguments[:3] if isinstance(x, torch.Tensor) and x.dim() == 4]
            if arguments[name == "convolution_backward"].shape[1] > 1:  # not the 25 ones of `spread_constant`
                self.seen += 1
                shapes = [tuple(x.shape) for x in tensors if not x.is_contiguous(memory_format=CHANNELS_LAST)]
                self.others += [(name, shape) for shape in shapes]
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("preset", ["sdsen_s2", "mdsen_sc", "mcnn_sr", "dsen", "dsen_maxpool", "dsen_wo_se", "cnn"])
def test_every_convolution_of_a_step_is_channels_last(preset, padded, monkeypatch):
    if padded:
        monkeypatch.setattr(convolution, "padded_outputs", lambda channels, *_: max(64, channels))
    settings = resolve(preset, {"precision": "bf16", "stage_num": 2 if model.build(preset).stage_num > 1 else 1})
    network, criterion = model.build(settings).train(), losses.build(settings)
    O, B = torch.rand(2, 2, 3, 20, 24)  # as they come: NCHW
    with Formats() as formats:
        main.add_gradients(network, criterion, settings, O, B)
    assert formats.seen >= 2 * 6 * network.stage_num - (preset == "dsen_maxpool")
    assert formats.others == []


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_every_convolution_of_an_image_is_channels_last(precision):
    network = model.build("sdsen_s2").eval()
    with autocast(precision, CPU), Formats() as formats:
        list(rain_layers(network, torch.rand(3, 20, 24)))
    assert formats.seen == 2 * (1 + 4 + 2) + 4
    assert formats.others == []


def test_the_first_layer_of_a_group_network_takes_a_plain_image():
    with pytest.raises(ValueError, match="P4ConvZ2"):
        P4ConvZ2(3, 2, 5, padding=2)(torch.zeros(1, 4, 8, 8))

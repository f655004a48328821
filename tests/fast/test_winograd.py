"""Winograd's convolution against the direct one: outputs and gradients, of any size, in pieces, from several inputs."""

import pytest
import torch
import torch.nn.functional as F

import model
from fast import convolution, native, winograd
from fast.convolution import Filters, conv2d, shared_filters

# (images, channels of each input, results, height, width)
SIZES = [
    (2, (40,), 40, 64, 64),
    (1, (40, 40), 40, 33, 47),
    (3, (12, 8), 20, 5, 3),
    (1, (16,), 8, 1, 1),
    (5, (9,), 10, 17, 4),
]


@pytest.fixture(autouse=True, params=["compiled", "in torch"], ids=["compiled", "in-torch"])
def way(request, monkeypatch):
    """All of this holds with winograd.cpp and in torch."""
    if request.param == "in torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no C++ compiler")


def make(images, channels, results, height, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(height)
    inputs = [torch.randn(images, count, height, width, generator=generator, dtype=torch.float64) for count in channels]
    scale = (25 * sum(channels)) ** -0.5
    filters = torch.randn(results, sum(channels), 5, 5, generator=generator, dtype=torch.float64) * scale
    bias = torch.randn(results, generator=generator, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (*inputs, filters, bias)]


def convolve(inputs, filters, bias):
    with shared_filters():
        return conv2d(inputs, Filters(filters, bias))


def direct(inputs, filters, bias):
    return F.conv2d(torch.cat(inputs, 1), filters, bias, padding=2)


@pytest.mark.parametrize("chunk", [4, 100, 10**6])
@pytest.mark.parametrize("size", SIZES)
def test_outputs_and_gradients_are_those_of_the_direct_convolution(size, chunk, monkeypatch):
    monkeypatch.setattr(winograd, "CHUNK", chunk)
    *inputs, filters, bias = leaves = make(*size)
    y = convolve(inputs, filters, bias)
    assert type(y.grad_fn).__name__ == "ConvolutionBackward"  # not the direct way
    gradient = torch.randn_like(y)
    found = [y, *torch.autograd.grad(y, leaves, gradient)]
    *inputs, filters, bias = leaves = make(*size, dtype=torch.float64)
    y = direct(inputs, filters, bias)
    wanted = [y, *torch.autograd.grad(y, leaves, gradient.double())]
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 3e-5 * max(1, other.abs().max())


def test_mean_error_is_at_most_ten_times_the_direct_convolutions():
    *inputs, filters, bias = make(2, (40, 40), 40, 64, 64)
    exact = direct([x.double() for x in inputs], filters.double(), bias.double())
    ours = (convolve(inputs, filters, bias) - exact).abs().mean()
    assert ours < 10 * (direct(inputs, filters, bias) - exact).abs().mean()


def test_two_passes_through_shared_filters_add_their_gradients():
    x, filters, bias = make(1, (8,), 8, 9, 10)
    with shared_filters():
        made = Filters(filters, bias)
        y = conv2d([conv2d([x], made)], made)
    found = torch.autograd.grad(y.square().sum(), (x, filters, bias))
    y = direct([direct([x], filters, bias)], filters, bias)
    for one, other in zip(found, torch.autograd.grad(y.square().sum(), (x, filters, bias)), strict=True):
        assert (one - other).abs().max() < 1e-4 * other.abs().max()


def test_a_pass_without_gradients_leaves_training_possible():
    *inputs, filters, bias = make(1, (8,), 8, 40, 40)
    winograd.work.kept.clear()
    with torch.inference_mode():
        convolve(inputs, filters, bias)
    convolve(inputs, filters, bias).sum().backward()
    assert filters.grad.abs().max() > 0


@pytest.mark.parametrize(
    "case", ["alone", "few channels", "double", "3x3", "autocast"], ids=lambda case: case.replace(" ", "-")
)
def test_elsewhere_the_direct_way_is_taken(case):
    x, filters = torch.zeros(1, 8, 8, 8), torch.zeros(8, 8, 5, 5)
    if case == "few channels":
        x, filters = x[:, :7], filters[:, :7]
    if case == "double":
        x, filters = x.double(), filters.double()
    if case == "3x3":
        filters = filters[..., 1:-1, 1:-1]
    with shared_filters():
        assert convolution.winograd_fits([torch.zeros(1, 8, 8, 8)], torch.zeros(8, 8, 5, 5))
        with torch.autocast("cpu", enabled=case == "autocast"):
            assert case == "alone" or not convolution.winograd_fits([x], filters)
    assert not convolution.winograd_fits([x], filters)


@pytest.mark.parametrize("slope", [0.2, 1.0])
@pytest.mark.parametrize("preset", ["sdsen_s4", "mcnn_sr", "mdsen_sc"])
def test_a_network_gives_the_same_as_with_direct_convolutions(preset, slope, monkeypatch):
    monkeypatch.setattr(model, "SLOPE", slope)
    torch.manual_seed(0)
    network = model.build(preset)
    O, B = torch.rand(2, 2, 3, 30, 37)

    def loss_and_gradients(network, O, B):
        rain_layers = network(O, 4)
        loss = sum(F.mse_loss(R, O - B) for R in rain_layers)
        return rain_layers, torch.autograd.grad(loss, list(network.parameters()))

    found, gradients = loss_and_gradients(network, O, B)
    wanted, exact = loss_and_gradients(network.double(), O.double(), B.double())
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() < 1e-5 * max(1, other.abs().max())
    # A value next to zero may get the other slope of LeakyReLU by rounding, with direct convolutions as well; then
    # gradients differ by up to 1e-3. With one slope for all values they must agree.
    for one, other in zip(gradients, exact, strict=True):
        assert (one - other).norm() < (1e-5 if slope == 1 else 1e-2) * other.norm() + 1e-7

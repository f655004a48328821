"""Winograd's convolution against the direct one: outputs and gradients, of any size, of several inputs, in bands."""

import pytest
import torch
import torch.nn.functional as F

import model
from fast import winograd
from fast.convolution import Filters, conv2d

pytestmark = pytest.mark.skipif(winograd.library() is None, reason="no C++ compiler")

# (images, channels of each input, channels of the output, height, width)
SIZES = [
    (2, (40,), 40, 64, 64),
    (1, (40, 40), 40, 33, 47),
    (3, (12, 8), 20, 5, 3),
    (1, (16,), 8, 1, 1),
    (5, (9,), 10, 17, 4),
    (2, (17, 8, 30), 9, 16, 21),
    (1, (20,), 83, 3, 34),
]
CHANNELS_LAST = torch.channels_last


def make(images, channels, outputs, height, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(height)
    inputs = [torch.randn(images, count, height, width, generator=generator, dtype=torch.float64) for count in channels]
    scale = (25 * sum(channels)) ** -0.5
    filters = torch.randn(outputs, sum(channels), 5, 5, generator=generator, dtype=torch.float64) * scale
    bias = torch.randn(outputs, generator=generator, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (*inputs, filters, bias)]


def convolve(inputs, filters, bias):
    return conv2d(inputs, Filters(filters, bias, shared=True), padding=2)


def direct(inputs, filters, bias):
    return F.conv2d(torch.cat(inputs, 1), filters, bias, padding=2)


@pytest.mark.parametrize("memory", [torch.contiguous_format, CHANNELS_LAST], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize("size", SIZES)
def test_outputs_and_gradients_are_those_of_the_direct_convolution(size, memory):
    *inputs, filters, bias = leaves = make(*size)
    y = convolve([x.contiguous(memory_format=memory) for x in inputs], filters, bias)
    assert type(y.grad_fn).__name__ == "ConvolutionBackward"  # not the direct way
    gradient = torch.randn_like(y).contiguous(memory_format=memory)
    found = [y, *torch.autograd.grad(y, leaves, gradient)]
    *inputs, filters, bias = leaves = make(*size, dtype=torch.float64)
    y = direct(inputs, filters, bias)
    wanted = [y, *torch.autograd.grad(y, leaves, gradient.double())]
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 3e-5 * max(1, other.abs().max())


@pytest.mark.parametrize(("channels", "outputs"), [((8,), 9), ((40, 40), 40), ((17, 8), 83)])
@pytest.mark.parametrize(("height", "width"), [(12, 20), (7, 9)])
def test_bands_are_convolved_as_images_and_nothing_else_is_written(channels, outputs, height, width):
    *inputs, filters, bias = (x.detach() for x in make(1, channels, outputs, height, width))
    rows, columns = 4 * winograd.tiles(height), winograd.tiles(width)
    bands = [torch.zeros(rows + 4, 4, columns + 2, count) for count in channels]
    for x, band in zip(inputs, bands, strict=True):
        winograd.to_band(x[0].permute(1, 2, 0), band[2:])
    out = torch.full((rows, 4, columns + 2, outputs), 7.0)
    winograd.convolve_bands(bands, winograd.transform_filters(filters), bias, out[:, :, 1:-1])
    found, wanted = torch.empty(height, width, outputs), direct(inputs, filters, bias)[0].permute(1, 2, 0)
    winograd.from_band(out[:, :, 1:-1], found)
    assert (found - wanted).abs().max() < 3e-5 * wanted.abs().max()
    assert out[:, :, [0, -1]].unique().tolist() == [7.0]


def test_mean_error_is_at_most_ten_times_the_direct_convolutions():
    *inputs, filters, bias = make(2, (40, 40), 40, 64, 64)
    exact = direct([x.double() for x in inputs], filters.double(), bias.double())
    ours = (convolve(inputs, filters, bias) - exact).abs().mean()
    assert ours < 10 * (direct(inputs, filters, bias) - exact).abs().mean()


def test_two_passes_through_shared_filters_add_their_gradients():
    x, filters, bias = make(1, (8,), 8, 9, 10)
    shared = Filters(filters, bias, shared=True)
    y = conv2d([conv2d([x], shared, padding=2)], shared, padding=2)
    found = torch.autograd.grad(y.square().sum(), (x, filters, bias))
    y = direct([direct([x], filters, bias)], filters, bias)
    for one, other in zip(found, torch.autograd.grad(y.square().sum(), (x, filters, bias)), strict=True):
        assert (one - other).abs().max() < 1e-4 * other.abs().max()


CASES = ["alone", "few inputs", "few outputs", "double", "3x3", "autocast", "stride", "no library"]


@pytest.mark.parametrize("case", CASES)
def test_elsewhere_the_direct_way_is_taken(case, monkeypatch):
    x, filters, stride = torch.ones(1, 8, 8, 8), torch.ones(8, 8, 5, 5, requires_grad=True), 1
    assert type(convolve([x], filters, None).grad_fn).__name__ == "ConvolutionBackward"
    if case == "few inputs":
        x, filters = x[:, :7], filters[:, :7]
    if case == "few outputs":
        filters = filters[:7]
    if case == "double":
        x, filters = x.double(), filters.double()
    if case == "3x3":
        filters = filters[..., 1:-1, 1:-1]
    if case == "stride":
        stride = 2
    if case == "no library":
        monkeypatch.setattr(winograd, "library", lambda: None)
    with torch.autocast("cpu", enabled=case == "autocast"):
        y = conv2d([x], Filters(filters, None, shared=case != "alone"), stride, 2)
    assert type(y.grad_fn).__name__ == ("HalfConvolutionBackward" if case == "autocast" else "ConvolutionBackward0")


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

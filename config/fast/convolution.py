"""Convolutions of networks whose stages share their weights: filters are made once, and the fastest way is taken.

`conv2d` chooses the way. With shared filters, that is, in the forward pass of a network, 5x5 convolutions in float32 on
the CPU go through winograd.py, and those under autocast through `HalfConvolution`. The rest is PyTorch's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.devices import autocast_dtype, without_autocast
from fast import winograd
from fast.winograd import HALO, KERNEL, Convolution, convolution_backward, side_by_side, transform_filters

Pair = int | tuple[int, int]
HOPPER = 9  # major compute capability of H100 and H200


class Filters:
    """Filters (O, I, k, k) and bias (O) of an ordinary convolution, and what is derived from them, computed once.

    They live no longer than the forward pass that made them, and its gradients. `shared`: by the stages of a network.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, shared: bool = False):
        self.weight = weight.contiguous(memory_format=torch.channels_last)  # as the images that they meet
        self.bias, self.shared, self._half = bias, shared, None

    @cached_property
    def matrices(self) -> Tensor:
        """(64, I, O): see `winograd.transform_filters`."""
        return transform_filters(self.weight)

    @cached_property
    def transposed(self) -> Tensor:
        """The matrices (64, O, I) of the transposed convolution, which takes the output's gradient to the input's."""
        return transform_filters(self.weight.detach().flip(-2, -1).transpose(0, 1))

    def half(self) -> Tensor:  # no cached_property, which TorchDynamo does not trace
        """The copy (O', I, k, k) in autocast's type, without gradients, channels-last; see `padded_outputs` for O'."""
        if self._half is None:
            half = self.weight.detach().to(autocast_dtype(self.weight))
            missing = padded_outputs(len(half), half.dtype, half.device) - len(half)
            self._half = F.pad(half, (0, 0, 0, 0, 0, 0, 0, missing)).contiguous(memory_format=torch.channels_last)
        return self._half


class FilterLayer:
    """For a convolution layer: the filters that it makes of its parameters, anew in each forward pass."""

    make_filters: Callable[[], tuple[Tensor, Tensor | None]]  # the ordinary convolution's (O, I, k, k) and bias (O)
    stride: Pair
    padding: Pair
    shared: Filters | None = None  # see `shared_filters`

    def filters(self) -> Filters:
        """Those of this forward pass, within `shared_filters`, or new ones."""
        return Filters(*self.make_filters()) if self.shared is None else self.shared

    def convolve(self, inputs: Sequence[Tensor], constant: Tensor | None = None) -> Tensor:
        """`conv2d` with these filters."""
        return conv2d(inputs, self.filters(), self.stride, self.padding, constant)


def filters_of(network: nn.Module) -> dict[FilterLayer, Filters]:
    """The filters of all layers of `network`, gradients included, for the stages of one forward pass."""
    layers = (module for module in network.modules() if isinstance(module, FilterLayer))
    filters = {layer: Filters(*layer.make_filters(), shared=True) for layer in layers}
    for shared in filters.values():  # before the stages, so that all stages do the same
        if autocast_dtype(shared.weight):
            shared.half()
        if winograd_fits((), shared):
            shared.matrices  # noqa: B018
    return filters


@contextmanager
def shared_filters(filters: dict[FilterLayer, Filters]) -> Iterator[None]:
    """Within this, each layer uses these filters. The weights must not change before the gradients are computed.

    They are set on the layers themselves, so only one thread at a time may use a network.
    """
    for layer, shared in filters.items():
        layer.shared = shared
    try:
        yield
    finally:
        for layer in filters:
            layer.shared = None


class SharedConv2d(FilterLayer, nn.Conv2d):
    """An ordinary convolution (N, I, H, W) -> (N, O, H', W'), of one feature map or of several side by side."""

    def make_filters(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias

    def forward(self, *inputs: Tensor, constant: Tensor | None = None) -> Tensor:
        return self.convolve(inputs, constant)


def conv2d(
    inputs: Sequence[Tensor], filters: Filters, stride: Pair = 1, padding: Pair = 0, constant: Tensor | None = None
) -> Tensor:
    """Convolution of images (N, I_k, H, W), side by side in the channels, with zeros around them: (N, O, H', W').

    `constant` (C) are the values of further channels behind them, each the same in the whole image; only for 5x5
    filters with stride 1 and padding 2. I of the filters is the sum of all I_k, and C.
    """
    if constant is not None:
        known, rest = filters.weight.split([filters.weight.shape[1] - len(constant), len(constant)], 1)
        y = conv2d(inputs, Filters(known, filters.bias, filters.shared), stride, padding)
        return y + spread_constant(rest, constant, *y.shape[-2:]).to(y.dtype)
    same_size = filters.weight.shape[-1] == KERNEL and stride in (1, (1, 1)) and padding in (HALO, (HALO, HALO))
    if same_size and winograd_fits(inputs, filters):
        return Convolution.apply(lambda: filters.transposed, filters.matrices, filters.weight, filters.bias, *inputs)
    dtype = autocast_dtype(inputs[0])
    if same_size and dtype is not None and filters.shared:
        inputs = [x.to(dtype) for x in inputs]
        return HalfConvolution.apply(filters.half(), filters.weight, filters.bias, *inputs)
    return F.conv2d(side_by_side(inputs), filters.weight, filters.bias, stride, padding)


def winograd_fits(inputs: Sequence[Tensor], filters: Filters) -> bool:
    """Whether the compiled library takes these images (N, I_k, H, W) and filters (O, I, 5, 5)."""
    tensors = (*inputs, filters.weight)
    return (
        filters.shared  # a single layer, which may be compared with GrouPy's, would be less close than a network
        and not torch.compiler.is_compiling()
        and filters.weight.shape[-2:] == (KERNEL, KERNEL)
        and len(filters.weight) >= winograd.CHANNELS
        and all(len(x) > 0 and x.shape[1] >= winograd.CHANNELS for x in tensors)
        and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
        and not torch.is_autocast_enabled("cpu")
        and winograd.library() is not None
    )


def spread_constant(filters: Tensor, constant: Tensor, height: int, width: int) -> Tensor:
    """The output (1, O, H, W) of filters (O, C, 5, 5) for an image whose channels are constants (C), zeros around it.

    All pixels but the two outermost ones on each side have the same value, so an image of 5x5 pixels suffices.
    """
    with without_autocast(filters):
        summed = (filters * constant[:, None, None]).sum(1, keepdim=True)  # (O, 1, 5, 5)
        ones = filters.new_ones(1, 1, min(height, KERNEL), min(width, KERNEL))
        spread = F.conv2d(ones, summed, padding=HALO)
    for dim, length in ((2, height), (3, width)):
        if length > KERNEL:
            first, middle, last = spread.split([HALO, 1, HALO], dim)
            size = [length - 2 * HALO if each == dim else -1 for each in range(4)]
            spread = torch.cat([first, middle.expand(size), last], dim)
    return spread.contiguous(memory_format=torch.channels_last)


def padded_outputs(channels: int, dtype: torch.dtype, device: torch.device) -> int:
    """Output channels that a convolution of so many is computed with: on Hopper GPUs in 16 bits 64 instead of 33 to 63.

    cuDNN's kernels there work on tiles of 64 channels. `bench/bench.py --only convolutions` measures what is fast.
    """
    if dtype not in (torch.bfloat16, torch.float16) or not 32 < channels < 64 or device.type != "cuda":
        return channels
    return 64 if torch.cuda.get_device_capability(device)[0] == HOPPER else channels


class HalfConvolution(torch.autograd.Function):
    """5x5 convolution, channels-last, with 16-bit copies of float32 filters, in which the calls' gradients add up."""

    @staticmethod
    def forward(half: Tensor, weight: Tensor, bias: Tensor | None, *inputs: Tensor) -> Tensor:
        """`half` (O', I, 5, 5) is `Filters.half` of `weight` (O, I, 5, 5); inputs (N, I_k, H, W)."""
        if bias is not None:
            bias = F.pad(bias, (0, len(half) - len(weight))).to(half.dtype)
        return F.conv2d(side_by_side(inputs), half, bias, padding=HALO)[:, : len(weight)]

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        half, weight, _, *images = inputs
        ctx.save_for_backward(half, weight, *images)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        half, weight, *inputs = ctx.saved_tensors
        _, needs_weight, needs_bias, *needs_inputs = ctx.needs_input_grad
        d_bias = gradient.sum((0, 2, 3), dtype=weight.dtype) if needs_bias else None
        if torch.is_grad_enabled():  # for second-order gradients, also those with respect to the filters
            half = weight.to(half.dtype)
        else:
            gradient = _padded(gradient, len(half))
        needs = [any(needs_inputs), needs_weight, False]
        d_inputs, d_weight, _ = convolution_backward(gradient, inputs, half, needs)
        d_weight = None if d_weight is None else d_weight[: len(weight)].to(weight.dtype)
        return None, d_weight, d_bias, *d_inputs


def _padded(x: Tensor, channels: int) -> Tensor:
    """(N, C, H, W) in channels-last memory, with zeros in further channels up to `channels`."""
    number, known, height, width = x.shape
    if known == channels:
        return x.contiguous(memory_format=torch.channels_last)
    padded = x.new_empty(number, height, width, channels).permute(0, 3, 1, 2)
    padded[:, :known] = x
    padded[:, known:] = 0
    return padded

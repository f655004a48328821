"""Convolutions of networks whose stages share their weights: filters are made once, and the fastest way is taken.

`conv2d` chooses the way. With shared filters, that is, in the forward pass of a network, 5x5 convolutions go

- in float32 on the CPU through the compiled library (winograd.py), if they have enough channels;
- under autocast with 16-bit copies of the filters that are made once as well, with as many outputs as the device is
  fast with (`HalfConvolution`, `padded_outputs`).

Everything else is PyTorch's own convolution.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.devices import autocast_dtype, without_autocast
from fast import native
from fast.winograd import HALO, KERNEL, Convolution, transform_filters

HOPPER = 9  # major compute capability of H100 and H200


class Filters:
    """Filters (O, I, k, k) and bias (O) of an ordinary convolution, and what is derived from them, computed once.

    They live no longer than the forward pass that made them, and its gradients.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, shared: bool = False, full: "Filters | None" = None):
        """`shared` by the stages of a network; of `full`, if given, these are the first input channels' filters."""
        self.weight = weight.contiguous(memory_format=torch.channels_last)  # as the images that they meet
        self.bias, self.shared = bias, shared
        self._half: Tensor | None = None
        self._full = full

    @cached_property
    def matrices(self) -> Tensor:
        """(64, I, O): see `winograd.transform_filters`."""
        if self._full is not None:
            return self._full.matrices[:, : self.weight.shape[1]]
        return transform_filters(self.weight)

    @cached_property
    def transposed(self) -> Tensor:
        """The matrices (64, O, I) of the transposed convolution, which takes the output's gradient to the input's."""
        if self._full is not None:
            return self._full.transposed[..., : self.weight.shape[1]]
        return transform_filters(self.weight.detach().flip(-2, -1).transpose(0, 1))

    def half(self, dtype: torch.dtype) -> Tensor:
        """The 16-bit copy (O', I, k, k) without gradients, channels-last; see `padded_outputs` for O'."""
        if self._half is None or self._half.dtype != dtype:
            if self._full is not None:
                half = self._full.half(dtype)[:, : self.weight.shape[1]]
            else:
                half = self.weight.detach().to(dtype)
                missing = padded_outputs(len(half), dtype, half.device) - len(half)
                half = F.pad(half, (0, 0, 0, 0, 0, 0, 0, missing))
            self._half = half.contiguous(memory_format=torch.channels_last)
        return self._half

    def prepare(self) -> None:
        """Compute what `conv2d` is going to need, with its gradients."""
        if dtype := autocast_dtype(self.weight):
            self.half(dtype)
        if winograd_fits((), self):
            self.matrices  # noqa: B018

    def of_first(self, inputs: int) -> "Filters":
        """The filters of the first `inputs` input channels alone."""
        return Filters(self.weight[:, :inputs], self.bias, self.shared, full=self)


class FilterLayer:
    """For a convolution layer: the filters that it makes of its parameters, anew in each forward pass."""

    shared: Filters | None = None  # see `shared_filters`

    def make_filters(self) -> tuple[Tensor, Tensor | None]:
        """The ordinary convolution's filters (O, I, k, k) and bias (O)."""
        return self.weight, self.bias

    def filters(self) -> Filters:
        """Those of this forward pass, within `shared_filters`, or new ones."""
        return Filters(*self.make_filters()) if self.shared is None else self.shared


def filters_of(network: nn.Module) -> dict[FilterLayer, Filters]:
    """The filters of all layers of `network`, gradients included, for the stages of one forward pass."""
    layers = (module for module in network.modules() if isinstance(module, FilterLayer))
    filters = {layer: Filters(*layer.make_filters(), shared=True) for layer in layers}
    for shared in filters.values():
        shared.prepare()  # before the stages, so that all stages do the same
    return filters


@contextmanager
def shared_filters(filters: dict[FilterLayer, Filters]) -> Iterator[None]:
    """Within this, each layer uses these filters. The weights must not change before the gradients are computed."""
    for layer, shared in filters.items():
        layer.shared = shared
    try:
        yield
    finally:
        for layer in filters:
            layer.shared = None


class SharedConv2d(FilterLayer, nn.Conv2d):
    """An ordinary convolution (N, I, H, W) -> (N, O, H', W'), of one feature map or of several side by side."""

    def forward(self, *inputs: Tensor, constant: Tensor | None = None) -> Tensor:
        """`constant` (C) as in `conv2d`."""
        return conv2d(inputs, self.filters(), self.stride, self.padding, constant)


def conv2d(
    inputs: Sequence[Tensor],
    filters: Filters,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    constant: Tensor | None = None,
) -> Tensor:
    """Convolution of images (N, I_k, H, W), side by side in the channels, with zeros around them: (N, O, H', W').

    `constant` (C) are the values of further channels behind them, each the same in the whole image; only for 5x5
    filters with stride 1 and padding 2. I of the filters is the sum of all I_k, and C.
    """
    kernel = filters.weight.shape[-1]
    same_size = kernel == KERNEL and stride in (1, (1, 1)) and padding in (HALO, (HALO, HALO))
    if constant is not None:
        if not same_size:
            raise ValueError("a constant is for 5x5 filters with stride 1 and padding 2")
        known = filters.weight.shape[1] - len(constant)
        spread = spread_constant(filters.weight[:, known:], constant, *inputs[0].shape[-2:])
        y = conv2d(inputs, filters.of_first(known), stride, padding)
        return y + spread.to(y.dtype)
    if same_size and winograd_fits(inputs, filters):
        return Convolution.apply(lambda: filters.transposed, filters.matrices, filters.weight, filters.bias, *inputs)
    dtype = autocast_dtype(inputs[0])
    if same_size and dtype is not None and filters.shared:
        inputs = [x.to(dtype) for x in inputs]
        return HalfConvolution.apply(filters.half(dtype), filters.weight, filters.bias, *inputs)
    return F.conv2d(side_by_side(inputs), filters.weight, filters.bias, stride, padding)


def winograd_fits(inputs: Sequence[Tensor], filters: Filters) -> bool:
    """Whether the compiled library takes these images (N, I_k, H, W) and filters (O, I, 5, 5).

    Only in a network's forward pass, whose output it keeps to 1e-5: the output of a single layer, which may be compared
    with GrouPy's, would not be as close.
    """
    tensors = (*inputs, filters.weight)
    return (
        filters.shared
        and not torch.compiler.is_compiling()
        and filters.weight.shape[-2:] == (KERNEL, KERNEL)
        and len(filters.weight) >= native.CHANNELS
        and all(x.shape[1] >= native.CHANNELS for x in tensors)
        and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
        and not torch.is_autocast_enabled("cpu")
        and native.library() is not None
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
            shape = list(spread.shape)
            shape[dim] = length - 2 * HALO
            spread = torch.cat([first, middle.expand(shape), last], dim)
    return spread.contiguous(memory_format=torch.channels_last)


def side_by_side(images: Sequence[Tensor]) -> Tensor:
    """Images (N, C_k, H, W) joined in the channels; channels-last, if they are, which cat would not see for N = 1."""
    if len(images) == 1:
        return images[0]
    return torch.cat([x.permute(0, 2, 3, 1) for x in images], 3).permute(0, 3, 1, 2)


def padded_outputs(channels: int, dtype: torch.dtype, device: torch.device) -> int:
    """Output channels that a convolution of so many is computed with: on Hopper GPUs in 16 bits 64 instead of 33 to 63.

    cuDNN's kernels there work on tiles of 64 channels. `bench/bench.py --only convolutions` measures what is fast.
    """
    if dtype not in (torch.bfloat16, torch.float16) or not 32 < channels < 64 or device.type != "cuda":
        return channels
    return 64 if torch.cuda.get_device_capability(device)[0] == HOPPER else channels


class HalfConvolution(torch.autograd.Function):
    """5x5 convolution of 16-bit images with 16-bit copies of float32 filters, which get the gradients.

    The gradients of several calls add up in float32. Images and gradients stay in channels-last memory.
    """

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
        d_bias = gradient.sum((0, 2, 3), dtype=weight.dtype) if ctx.needs_input_grad[2] else None
        if torch.is_grad_enabled():  # for second-order gradients, also those with respect to the filters
            half = weight.to(half.dtype)
        else:
            gradient = _padded(gradient, len(half))
        needs = [any(ctx.needs_input_grad[3:]), ctx.needs_input_grad[1], False]
        d_x, d_weight, _ = torch.ops.aten.convolution_backward(
            gradient, side_by_side(inputs), half, None, [1, 1], [HALO, HALO], [1, 1], False, [0, 0], 1, needs
        )
        d_weight = None if d_weight is None else d_weight[: len(weight)].to(weight.dtype)
        d_inputs = [None] * len(inputs) if d_x is None else d_x.split([x.shape[1] for x in inputs], 1)
        return None, d_weight, d_bias, *d_inputs


def _padded(x: Tensor, channels: int) -> Tensor:
    """(N, C, H, W) in channels-last memory, with zeros in further channels up to `channels`."""
    if x.shape[1] == channels:
        return x.contiguous(memory_format=torch.channels_last)
    number, known, *size = x.shape
    padded = torch.empty((number, channels, *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    padded[:, :known] = x
    padded[:, known:] = 0
    return padded

"""5x5 convolutions of networks whose stages share their weights: filters made once, and the fastest way taken.

`conv2d` chooses the way, in one place. Within `shared_filters`, that is in a network's forward pass:

- float32 on the CPU goes Winograd's way (winograd.py), where there are channels enough;
- under autocast, convolutions read 16-bit copies of the filters, which are made once as well and are padded to the
  number of results that the device is fast with (`HalfConvolution`, `padded_results`).

Everything else is PyTorch's own convolution.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.devices import autocast_dtype, without_autocast
from fast.winograd import HALO, KERNEL, Convolution, transform_filters

HOPPER = 9  # major compute capability of H100 and H200


class Filters:
    """Filters (O, I, 5, 5) and bias (O) of an ordinary convolution, with what is made of them, made once.

    It lives no longer than the forward pass that made it, and the gradients of that pass.
    """

    def __init__(
        self, filters: Tensor, bias: Tensor | None, half: Tensor | None = None, whole: "Filters | None" = None
    ):
        """`whole` has these filters as those of its first input channels, and what was made of it need only be cut."""
        self.filters = filters.contiguous(memory_format=torch.channels_last)  # as the images that they meet
        self.bias = bias
        self._half, self._whole = half, whole

    @cached_property
    def matrices(self) -> Tensor:
        """(64, I, O): see `winograd.transform_filters`."""
        if self._whole is not None:
            return self._whole.matrices[:, : self.filters.shape[1]]
        return transform_filters(self.filters)

    @cached_property
    def turned(self) -> Tensor:
        """The matrices that take the output's gradient to the input's: half a turn, inputs and outputs swapped."""
        if self._whole is not None:
            return self._whole.turned[..., : self.filters.shape[1]]
        return transform_filters(self.filters.detach().flip(-2, -1).transpose(0, 1))

    def half(self, dtype: torch.dtype) -> Tensor:
        """The 16-bit copy (O', I, 5, 5) without gradients, channels-last; see `padded_results` for O'."""
        if self._half is None or self._half.dtype != dtype:
            if self._whole is not None:
                half = self._whole.half(dtype)[:, : self.filters.shape[1]]
            else:
                half = self.filters.detach().to(dtype)
                more = padded_results(len(half), dtype, half.device) - len(half)
                half = F.pad(half, (0, 0, 0, 0, 0, 0, 0, more))
            self._half = half.contiguous(memory_format=torch.channels_last)
        return self._half

    def prepare(self) -> None:
        """Makes the matrices, with their gradients, where `conv2d` is going to need them."""
        if winograd_fits((), self.filters):
            self.matrices  # noqa: B018

    def of_first(self, inputs: int) -> "Filters":
        """The filters of the first `inputs` input channels alone."""
        return Filters(self.filters[:, :inputs], self.bias, whole=self)


class _Shared(threading.local):
    layers: dict | None = None


_shared = _Shared()


@contextmanager
def shared_filters(layers: dict | None = None) -> Iterator[Callable]:
    """Within this, each layer makes its filters once, gradients included: for the stages of one forward pass.

    Gives a function that makes a context with the same filters, for work that is repeated later. The weights must not
    change before the work is done; nothing is kept behind it.
    """
    layers = {} if layers is None else layers
    outer, _shared.layers = _shared.layers, layers
    try:
        yield lambda: shared_filters(layers)
    finally:
        _shared.layers = outer


@contextmanager
def compiled_filters(layers: Sequence["FilterLayer"]) -> Iterator[None]:
    """Within this, compiled code finds the shared filters of `layers`, which it can't look up by their layer."""
    for layer in layers:
        made = layer.filters()
        dtype = autocast_dtype(made.filters)
        layer.prepared = (made.filters, made.bias, dtype and made.half(dtype))
    try:
        yield
    finally:
        for layer in layers:
            layer.prepared = None


class FilterLayer:
    """For a convolution layer: the filters that it makes of its parameters, anew in each forward pass."""

    prepared: tuple | None = None  # see `compiled_filters`

    def make_filters(self) -> tuple[Tensor, Tensor | None]:
        """The ordinary convolution's filters (O, I, k, k) and bias (O)."""
        return self.weight, self.bias

    def filters(self) -> Filters:
        """Those of this forward pass, within `shared_filters`, or new ones."""
        if self.prepared is not None and torch.compiler.is_compiling():
            return Filters(*self.prepared)
        shared = _shared.layers
        if shared is None:
            return Filters(*self.make_filters())
        if self not in shared:
            shared[self] = Filters(*self.make_filters())
        return shared[self]


class Conv5x5(FilterLayer, nn.Conv2d):
    """An ordinary convolution (N, I, H, W) -> (N, O, H, W), of one feature map or of several side by side."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, KERNEL, padding=HALO)

    def forward(self, *inputs: Tensor, constant: Tensor | None = None) -> Tensor:
        """`constant` (C) are the values of the last C input channels, where these are the same in the whole image."""
        return conv2d(inputs, self.filters(), constant)


def padded_results(results: int, dtype: torch.dtype, device: torch.device) -> int:
    """Results with which a convolution of so many is computed: on Hopper GPUs in 16 bits 64 in the place of 33 to 63.

    cuDNN's kernels for these work on tiles of 64 results. Forward and backward on an H200, 64 crops of 64x64: 80 to 40
    channels 0.970 ms, 80 to 64 channels 0.723 ms; 40 to 40 channels 0.633 ms, 64 to 64 channels 0.503 ms. What is fast
    on a card, `bench/bench.py --only convolutions` tells.
    """
    if dtype not in (torch.bfloat16, torch.float16) or not 32 < results < 64 or device.type != "cuda":
        return results
    return 64 if torch.cuda.get_device_capability(device)[0] == HOPPER else results


def side_by_side(images: Sequence[Tensor]) -> Tensor:
    """Images (N, C_k, H, W) joined in the channels; channels-last, if they are, which cat would not see for N = 1."""
    if len(images) == 1:
        return images[0]
    return torch.cat([x.permute(0, 2, 3, 1) for x in images], 3).permute(0, 3, 1, 2)


class HalfConvolution(torch.autograd.Function):
    """Convolution of 16-bit images with 16-bit copies of float32 filters, for whose gradients these stand.

    The gradients of several calls add up in float32. Images and gradients keep to channels-last memory.
    """

    @staticmethod
    def forward(half: Tensor, filters: Tensor, bias: Tensor | None, *inputs: Tensor) -> Tensor:
        """`half` (O', I, 5, 5) is `Filters.half` of `filters` (O, I, 5, 5); inputs (N, I_k, H, W), I of them in all."""
        if bias is not None:
            bias = F.pad(bias, (0, len(half) - len(filters))).to(half.dtype)
        return F.conv2d(side_by_side(inputs), half, bias, padding=HALO)[:, : len(filters)]

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        half, filters, _, *images = inputs
        ctx.save_for_backward(half, filters, *images)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        half, filters, *inputs = ctx.saved_tensors
        d_bias = gradient.sum((0, 2, 3), dtype=filters.dtype) if ctx.needs_input_grad[2] else None
        if torch.is_grad_enabled():  # second-order gradients are asked for, also those with respect to the filters
            half = filters.to(half.dtype)
        else:
            gradient = _widened(gradient, len(half))
        needs = [any(ctx.needs_input_grad[3:]), ctx.needs_input_grad[1], False]
        d_x, d_filters, _ = torch.ops.aten.convolution_backward(
            gradient, side_by_side(inputs), half, None, [1, 1], [HALO, HALO], [1, 1], False, [0, 0], 1, needs
        )
        d_filters = None if d_filters is None else d_filters[: len(filters)].to(filters.dtype)
        d_inputs = [None] * len(inputs) if d_x is None else d_x.split([x.shape[1] for x in inputs], 1)
        return None, d_filters, d_bias, *d_inputs


def _widened(x: Tensor, channels: int) -> Tensor:
    """(N, C, H, W) in channels-last memory, with zeros in further channels up to `channels`."""
    if x.shape[1] == channels:
        return x.contiguous(memory_format=torch.channels_last)
    number, known, *size = x.shape
    wide = torch.empty((number, channels, *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    wide[:, :known] = x
    wide[:, known:] = 0
    return wide


def winograd_fits(inputs: Sequence[Tensor], filters: Tensor) -> bool:
    """Whether Winograd's way is allowed here, and the faster one: measured on the CPU, with enough channels.

    In a network's output it keeps to 1e-5, but that of a single layer, which may be asked to equal GrouPy's, would not
    quite: so it is for a network's forward pass alone.
    """
    return (
        not torch.compiler.is_compiling()
        and _shared.layers is not None
        and filters.shape[-2:] == (KERNEL, KERNEL)
        and min(filters.shape[:2]) >= 8
        and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in (*inputs, filters))
        and not torch.is_autocast_enabled("cpu")
    )


def conv2d(inputs: Sequence[Tensor], filters: Filters, constant: Tensor | None = None) -> Tensor:
    """5x5 convolution of images (N, I_k, H, W), taken side by side in the channels, with zeros around them.

    `constant` (C) are the values of further channels behind them, each the same in the whole image. I of the filters is
    the sum of all I_k, and C; result (N, O, H, W).
    """
    if constant is not None:
        known = filters.filters.shape[1] - len(constant)
        spread = spread_constant(filters.filters[:, known:], constant, *inputs[0].shape[-2:])
        y = conv2d(inputs, filters.of_first(known))
        return y + spread.to(y.dtype)
    dtype = autocast_dtype(inputs[0])
    if winograd_fits(inputs, filters.filters):
        return Convolution.apply(filters, filters.matrices, filters.filters, filters.bias, *inputs)
    if dtype is not None and (torch.compiler.is_compiling() or _shared.layers is not None):
        inputs = [x.to(dtype) for x in inputs]
        return HalfConvolution.apply(filters.half(dtype), filters.filters, filters.bias, *inputs)
    return F.conv2d(side_by_side(inputs), filters.filters, filters.bias, padding=HALO)


def spread_constant(filters: Tensor, constant: Tensor, height: int, width: int) -> Tensor:
    """What filters (O, C, 5, 5) make of an image whose channels are constants (C), zeros around it: (1, O, H, W).

    All pixels but the two outermost ones on each side get the same, so an image of 5x5 pixels tells the whole.
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

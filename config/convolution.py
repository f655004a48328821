"""5x5 convolutions of networks whose stages share their weights: filters made once, and the fastest way taken."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from winograd import HALO, KERNEL, Convolution, transform_filters


class Filters:
    """Filters (O, I, k, k) and bias (O) of an ordinary convolution, with what is made of them, made once."""

    def __init__(self, filters: Tensor, bias: Tensor | None):
        self.filters, self.bias = filters, bias

    @cached_property
    def matrices(self) -> Tensor:
        """(64, I, O): see `winograd.transform_filters`."""
        return transform_filters(self.filters)

    def prepare(self) -> None:
        """Makes what `conv2d` is going to make of these filters."""
        if winograd_fits((), self.filters):
            self.matrices  # noqa: B018

    @cached_property
    def turned(self) -> Tensor:
        """The matrices that take the output's gradient to the input's: half a turn, inputs and outputs swapped."""
        return transform_filters(self.filters.detach().flip(-2, -1).transpose(0, 1))


class _Shared(threading.local):
    layers: dict | None = None


_shared = _Shared()


@contextmanager
def shared_filters(layers: dict | None = None) -> Iterator[Callable]:
    """Within this, each layer makes its filters once, gradients included: for the stages of one forward pass.

    And within this 5x5 convolutions in float32 on the CPU go Winograd's way: the network's output keeps to 1e-5, but
    that of a single layer, which may be asked to equal GrouPy's, would not quite.

    Gives a function that makes a context with the same filters, for work that is repeated later.
    """
    layers = {} if layers is None else layers
    outer, _shared.layers = _shared.layers, layers
    try:
        yield lambda: shared_filters(layers)
    finally:
        _shared.layers = outer


class FilterKeeper:
    """For a convolution layer: the filters that it makes of its parameters, made anew only where they may differ.

    They are kept within `shared_filters`, and in eval mode without gradients until the parameters change.
    """

    _kept: tuple | None = None  # (what the filters were made from, the filters)
    prepared: tuple | None = None  # filters and bias for compiled code, which can't look among the shared ones

    def make_filters(self) -> tuple[Tensor, Tensor | None]:
        """The ordinary convolution's filters (O, I, k, k) and bias (O)."""
        return self.weight, self.bias

    def filters(self) -> Filters:
        if self.prepared is not None and torch.compiler.is_compiling():
            return Filters(*self.prepared)
        shared = _shared.layers
        if shared is not None and self in shared:
            return shared[self]
        parameters = list(self.parameters(recurse=False))
        source = None
        for_good = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        if for_good and not any(p.is_inference() for p in parameters):
            # A parameter is told by its storage and its count of in-place writes; `_apply` (.to(), .half()) forgets
            # what was kept, because new storage may lie at an old address. Inference tensors keep no count.
            source = [(p.data_ptr(), p._version, p.dtype, p.device) for p in parameters]
        if source is not None and self._kept is not None and self._kept[0] == source:
            return self._kept[1]
        made = Filters(*self.make_filters())
        if source is not None:
            self._kept = (source, made)
        if shared is not None:
            shared[self] = made
        return made

    def _apply(self, *arguments, **keywords):
        self._kept = None
        return super()._apply(*arguments, **keywords)

    def __getstate__(self) -> dict:  # copies and pickles make their own filters
        return {**super().__getstate__(), "_kept": None, "prepared": None}


class Conv5x5(FilterKeeper, nn.Conv2d):
    """An ordinary convolution (N, I, H, W) -> (N, O, H, W), of one feature map or of several side by side."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, KERNEL, padding=HALO)

    def forward(self, *inputs: Tensor) -> Tensor:
        return conv2d(inputs, self.filters())


def winograd_fits(inputs: Sequence[Tensor], filters: Tensor) -> bool:
    """Whether Winograd's way is allowed here, and the faster one: measured on the CPU, with enough channels."""
    return (
        not torch.compiler.is_compiling()
        and _shared.layers is not None
        and filters.shape[-2:] == (KERNEL, KERNEL)
        and min(filters.shape[:2]) >= 8
        and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in (*inputs, filters))
        and not torch.is_autocast_enabled("cpu")
    )


def conv2d(inputs: Sequence[Tensor], filters: Filters) -> Tensor:
    """5x5 convolution of images (N, I_k, H, W), taken side by side in the channels, with zeros around them.

    I of the filters is the sum of all I_k; result (N, O, H, W).
    """
    if winograd_fits(inputs, filters.filters):
        return Convolution.apply(filters, filters.matrices, filters.bias, *inputs)
    x = torch.cat(inputs, 1) if len(inputs) > 1 else inputs[0]
    return F.conv2d(x, filters.filters, filters.bias, padding=HALO)

"""A whole image of any size through a network: at once, or in windows of rows, as small as the memory requires.

An output row depends on some input rows to each side of it, the halo. So a window is computed together with its halo,
which is then cut off, and the result is that of the whole image. `through_all_stages` takes a window through all stages
of a network. `Windows` takes all windows through a stage of DSEN, whose features have a mean over the whole image.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from base.console import log
from base.devices import empty_cache, is_out_of_memory
from fast.convolution import filters_of, shared_filters
from fast.memory import MemoryBudget

CPU_PIXELS = 2**18  # of a window on the CPU, where full memory ends the process and so cannot be tried out
MIN_ROWS = 8


def first_rows(network: nn.Module, O: Tensor, memory: MemoryBudget) -> int:
    """The rows of the first window that is tried; at least the height of `O` (3, H, W) for the whole image."""
    _, height, width = O.shape
    if O.device.type != "cpu" or network.features_halo is network.halo is None:
        return height
    if network.features_halo is not None:
        return max(MIN_ROWS, CPU_PIXELS // width)
    rows = max(CPU_PIXELS // width, 2 * network.halo)  # so that at most half of the rows are computed twice
    return max(MIN_ROWS, min(rows, int(memory.left / (network.pixel_bytes * width)) - 2 * network.halo))


def at_once(network: nn.Module, O: Tensor, stage_num: int) -> list[Tensor] | None:
    """The rain layers (3, H, W) of the whole image `O` (3, H, W); None if it does not fit into the device's memory."""
    _, height, width = O.shape
    last_try = height <= MIN_ROWS or network.features_halo is network.halo is None
    found = _unless_out_of_memory(network.at_once, (O[None], stage_num), O.device, last_try)
    if found is None:
        log.info(f"{width}x{height} pixels do not fit into the memory of {O.device} at once: in windows of rows")
        return None
    return [R[0] for R in found]


def through_all_stages(
    network: nn.Module, O: Tensor, stage_num: int, rows: int, tick: Callable[[float], object]
) -> Iterator[Tensor]:
    """The rain layers (3, H, W) of `O` (3, H, W) from windows of `rows` rows that go through all stages."""
    height, stride = O.shape[1], network.stride
    rain_layers = torch.empty(stage_num, *O.shape, dtype=O.dtype, device=O.device)

    def window(top: int, end: int) -> list[Tensor]:
        low = max(0, top - network.halo) // stride * stride
        found = network(O[None, :, low : end + network.halo], stage_num)
        return [R[0, :, top - low : end - low] for R in found]

    for top, end, _, found in _in_windows(window, height, rows, O.device, stride):
        for R, part in zip(rain_layers, found, strict=True):
            R[:, top:end] = part
        tick((end - top) / height)
    yield from rain_layers


class Windows:
    """The stages of `network` (a DSEN in eval mode) on one image O (3, H, W), a window of rows after another."""

    def __init__(self, network: nn.Module, O: Tensor, rows: int, memory: MemoryBudget):
        self.network, self.memory = network, memory
        self.O, self.image = O, O.cpu()
        self.rows = rows  # of a window; halved if it is too large
        self.features: Tensor | None = None  # (H, W, C), on the CPU as all that is kept
        self.states: list[Tensor] = []  # of each layer, (H, W, C, 4), or (H, W, C) in ordinary networks
        self.above: list[Tensor] = []  # the previous stage's states in the halo above a window
        self.filters = filters_of(network)  # of all windows and stages

    def set_image(self, image: Tensor) -> None:
        self.image = image.cpu()  # the input (3, H, W) of the next stage

    def stage(self, last: bool) -> Iterator[float]:
        """One stage, which updates features and states; yields the share of its work done, after every window."""
        height, halo = self.O.shape[1], self.network.features_halo
        self.above = [state[:0] for state in self.states]
        for top, end, rows, (features, *states) in _in_windows(self._window, height, self.rows, self.O.device):
            self.rows = rows
            if self.features is None:
                self.features, *self.states = (
                    self.memory.zeros(height, *x.shape[1:], dtype=x.dtype)
                    for x in (features, *([] if last else states))
                )
            self.features[top:end] = features
            if self.above:
                both = zip(self.above, self.states, strict=True)
                self.above = [torch.cat([a, state[max(top, end - halo) : end]])[-halo:] for a, state in both]
            for state, new in zip(self.states, [] if last else states, strict=False):
                state[top:end] = new
            self.memory.release()
            yield (end - top) / height

    def _window(self, top: int, end: int) -> list[Tensor]:
        """Rows `top` to `end` of the features and of the new states, each (rows, W, ..) on the CPU."""
        low, high = max(top - self.network.features_halo, 0), end + self.network.features_halo
        states: list[Tensor | None] = [None] * len(self.network.re_layer)
        if self.above:
            both = zip(self.above, self.states, strict=True)
            windows = (torch.cat([a, state[top:high]]).to(self.O.device) for a, state in both)
            states = [window.movedim((0, 1), (-2, -1))[None] for window in windows]  # (1, C, 4, h, W)
        image = self.image[None, :, low:high].to(self.O.device).contiguous(memory_format=torch.channels_last)
        with shared_filters(self.filters):
            features, states = self.network.features(image, states)
        kept = [features, *states] if self.network.link != "none" else [features]
        return [x[0].movedim((-2, -1), (0, 1))[top - low : end - low].cpu() for x in kept]


def _in_windows(
    compute: Callable[[int, int], Any], height: int, rows: int, device: torch.device, stride: int = 1
) -> Iterator[tuple[int, int, int, Any]]:
    """(top, end, rows, compute(top, end)) of each window; `rows`, a multiple of `stride`, is halved where too large."""
    top = 0
    while top < height:
        rows = max(stride, rows // stride * stride)
        end = min(top + rows, height)
        found = _unless_out_of_memory(compute, (top, end), device, rows <= MIN_ROWS)
        if found is None:
            rows = max(MIN_ROWS, rows // 2)
            log.debug(f"in windows of {rows} rows")
        else:
            yield top, end, rows, found
            top = end


def _unless_out_of_memory(compute: Callable, arguments: tuple, device: torch.device, last_try: bool) -> Any:
    """The result of `compute`; None if the device's memory is too small for it, except on the last try."""
    try:
        return compute(*arguments)
    except RuntimeError as error:
        if last_try or not is_out_of_memory(error):
            raise
    empty_cache(device)  # here, where the error, which holds the computation's tensors, is gone
    return None

"""A whole image of any size through a network: at once, or in windows of rows, as small as the memory requires.

An output row depends on some input rows to each side of it, the halo. So a window is computed together with its halo,
which is then cut off, and the result is that of the whole image.

`through_all_stages` takes a window through all stages of a network. `Windows` takes all windows through one stage of
DSEN after another: there the halo is that of a stage, `network.features_halo`, and a stage needs the means of its
features over the whole image. Between the stages, features and states lie in the computer's own memory.
"""

from collections.abc import Callable, Iterator

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
    if O.device.type != "cpu":
        return height
    if network.features_halo is not None:
        return max(MIN_ROWS, CPU_PIXELS // width)
    if network.halo is None:
        return height
    rows = max(CPU_PIXELS // width, 2 * network.halo)  # so that at most half of the rows are computed twice
    return max(MIN_ROWS, min(rows, int(memory.left / (network.pixel_bytes * width)) - 2 * network.halo))


def at_once(network: nn.Module, O: Tensor, stage_num: int) -> list[Tensor] | None:
    """The rain layers (3, H, W) of the whole image `O` (3, H, W); None if it does not fit into the device's memory."""
    _, height, width = O.shape
    last_try = height <= MIN_ROWS or network.features_halo is network.halo is None
    found = _unless_out_of_memory(lambda: network.at_once(O[None], stage_num), O.device, last_try)
    if found is None:
        log.info(f"{width}x{height} pixels do not fit into the memory of {O.device} at once: in windows of rows")
        return None
    return [R[0] for R in found]


def through_all_stages(
    network: nn.Module, O: Tensor, stage_num: int, rows: int, tick: Callable[[float], object]
) -> Iterator[Tensor]:
    """The rain layers (3, H, W) of `O` (3, H, W) from windows of `rows` rows that go through all stages."""
    height, halo, stride = O.shape[1], network.halo, network.stride
    rain_layers = torch.empty(stage_num, *O.shape, dtype=O.dtype, device=O.device)
    top = 0
    while top < height:
        rows = max(stride, rows // stride * stride)
        low, high, end = max(0, top - halo) // stride * stride, min(height, top + rows + halo), min(top + rows, height)
        window = O[None, :, low:high]
        found = _unless_out_of_memory(lambda: network(window, stage_num), O.device, rows <= MIN_ROWS)  # noqa: B023
        if found is None:
            rows = max(MIN_ROWS, rows // 2)
            log.debug(f"in windows of {rows} rows")
            continue
        for R, part in zip(rain_layers, found, strict=True):
            R[:, top:end] = part[0, :, top - low : end - low]
        tick((end - top) / height)
        top = end
    yield from rain_layers


class Windows:
    """The stages of `network` (a DSEN in eval mode) on one image O (3, H, W), a window of rows after another."""

    def __init__(self, network: nn.Module, O: Tensor, rows: int, memory: MemoryBudget):
        self.network, self.memory = network, memory
        self.O, self.image = O, O.cpu()
        self.rows = rows  # of a window; halved if it is too large
        self.features: Tensor | None = None  # (H, W, C), on the CPU as all that is kept
        self.states: list[Tensor] = []  # of each layer, (H, W, planes)
        self.filters = filters_of(network)  # of all windows and stages
        self.state_shape: tuple[int, ...] = ()  # of a pixel's planes: (C, 4), or (C,) in ordinary networks

    def set_image(self, image: Tensor) -> None:
        """The input (3, H, W) of the next stage."""
        self.image = image.cpu()

    def stage(self, first: bool, last: bool) -> Iterator[float]:
        """One stage, which updates features and states; yields the share of its work done, after every window."""
        height, halo = self.O.shape[1], self.network.features_halo
        above = None if first else [state[:0] for state in self.states]  # the old states of the halo's rows
        top = 0
        while top < height:
            end = min(top + self.rows, height)
            found = _unless_out_of_memory(
                lambda: self._window(top, end, above),  # noqa: B023
                self.O.device,
                self.rows <= MIN_ROWS,
            )
            if found is None:
                self.rows = max(MIN_ROWS, self.rows // 2)
                log.debug(f"in windows of {self.rows} rows")
                continue
            features, states = found
            if self.features is None:
                self.features = self._whole(features)
            self.features[top:end] = features
            if above is not None:
                both = zip(above, self.states, strict=True)
                above = [torch.cat([a, state[max(top, end - halo) : end]])[-halo:] for a, state in both]
            if not last and self.network.link != "none":
                self.states = self.states or [self._whole(state) for state in states]
                for state, new in zip(self.states, states, strict=True):
                    state[top:end] = new
            self.memory.release()
            yield (end - top) / height
            top = end

    def _window(self, top: int, end: int, above: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Rows `top` to `end` of the features and of the new states, each (rows, W, planes) on the CPU."""
        halo = self.network.features_halo
        low, high = max(top - halo, 0), min(end + halo, self.O.shape[1])
        states: list[Tensor | None] = [None] * len(self.network.re_layer)
        if above:
            both = zip(above, self.states, strict=True)
            windows = (torch.cat([a, state[top:high]]).to(self.O.device) for a, state in both)
            states = [window.permute(2, 0, 1)[None].unflatten(1, self.state_shape) for window in windows]
        image = self.image[None, :, low:high].to(self.O.device).contiguous(memory_format=torch.channels_last)
        with shared_filters(self.filters):
            features, states = self.network.features(image, states)
        self.state_shape = states[0].shape[1:-2]

        def inner(x: Tensor) -> Tensor:  # (1, C, 4, h, W) or (1, C, h, W) to (rows, W, planes)
            return x.flatten(1, -3)[0, :, top - low : end - low].permute(1, 2, 0).cpu()

        return inner(features), [inner(state) for state in states] if self.network.link != "none" else []

    def _whole(self, part: Tensor) -> Tensor:
        """Zeros (H, W, planes) for what `part` (rows, W, planes) is a part of."""
        return self.memory.zeros(self.O.shape[1], *part.shape[1:], dtype=part.dtype)


def _unless_out_of_memory(compute: Callable, device: torch.device, last_try: bool):
    """The result of `compute`; None if the device's memory is too small for it, except on the last try."""
    try:
        return compute()
    except RuntimeError as error:
        if last_try or not is_out_of_memory(error):
            raise
    empty_cache(device)  # here, where the error, which holds the computation's tensors, is gone
    return None

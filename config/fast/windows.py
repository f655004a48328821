"""A whole image of any size through a network: at once, or in windows of rows, as small as the memory asks.

What a network makes of a row depends on some rows to each side of it, the halo. So a window is computed together with
its halo, cut off afterwards, and the result is that of the whole image.

`all_stages` takes a window through all stages of a network. `each_stage` takes all windows through one stage of DSEN
after another: there the halo is that of a stage, `network.features_halo`, and a stage needs the means of its features
over the whole image. Between the stages, features and states lie in the computer's own memory. On the CPU this is the
way of the precisions that strips.py does not have.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from base.console import log
from base.devices import empty_cache, is_out_of_memory
from fast.convolution import shared_filters
from fast.memory import Room

CPU_PIXELS = 2**18  # of a window on the CPU, whose memory can't be tried out
LEAST_ROWS = 8


def each_stage(
    network: nn.Module, O: Tensor, stage_num: int, memory_gib: float, tick: Callable[[float], object]
) -> Iterator[Tensor]:
    """The rain layers R_t (3, H, W), one after another, of `O` (3, H, W); arguments as those of `Network.each_stage`.

    Raises the device's own error where its memory is too small for a few rows.
    """
    _, height, width = O.shape
    rows = max(LEAST_ROWS, CPU_PIXELS // width) if O.device.type == "cpu" else height
    if rows >= height:
        rain_layers = _unless_out_of_memory(lambda: network.at_once(O[None], stage_num), O.device, height <= LEAST_ROWS)
        if rain_layers is not None:
            for R in rain_layers:
                yield R[0]
                tick(1 / stage_num)
            return
        rows = height // 2
        log.info(f"{width}x{height} pixels at once are too many for the memory of {O.device}: in windows of rows")
    room = Room(memory_gib)
    room.reserve(4 * 4 * O.numel())  # image, rain layer, and what the caller makes of it
    runner = _Windows(network, O, rows, room)
    for stage in range(stage_num):
        for share in runner.stage(first=stage == 0, last=stage == stage_num - 1):
            tick(share / stage_num)
        yield runner.rain_layer()


def all_stages(
    network: nn.Module, O: Tensor, stage_num: int, memory_gib: float, tick: Callable[[float], object]
) -> Iterator[Tensor]:
    """The same of any network; arguments as those of `Network.each_stage`."""
    _, height, width = O.shape
    halo, room = network.halo, Room(memory_gib)
    room.reserve(4 * O.numel() * (stage_num + 3))  # rain layers, image, and what the caller makes of it
    rows = height
    if O.device.type == "cpu":
        # Twice the halo keeps what is computed twice below the rest.
        rows = max(CPU_PIXELS // width, 2 * (halo or height))
        rows = max(LEAST_ROWS, min(rows, int(room.left / (network.pixel_bytes * width)) - 2 * (halo or 0)))
    if halo is None:  # it can't be cut
        rows = height
    rain_layers = torch.empty(stage_num, *O.shape, dtype=O.dtype, device=O.device)
    top = 0
    while top < height:
        low = high = None
        forward = network.at_once
        if rows < height:
            forward = network.forward
            rows = max(network.stride, rows // network.stride * network.stride)
            low, high = max(0, top - halo) // network.stride * network.stride, min(height, top + rows + halo)
        found = _unless_out_of_memory(
            lambda: forward(O[None, :, low:high], stage_num),  # noqa: B023
            O.device,
            rows <= LEAST_ROWS or halo is None,
        )
        if found is None:
            rows = max(LEAST_ROWS, min(rows, height) // 2)
            log.info(f"{width}x{height} pixels are too many for the memory of {O.device}: in windows of {rows} rows")
            continue
        end = min(top + rows, height)
        for R, window in zip(rain_layers, found, strict=True):
            R[:, top:end] = window[0, :, top - (low or 0) : end - (low or 0)]
        tick((end - top) / height)
        top = end
    yield from rain_layers


def _unless_out_of_memory(compute: Callable, device: torch.device, must: bool):
    """What `compute` returns; None where the device's memory is too small for that, unless it `must` do."""
    try:
        return compute()
    except RuntimeError as error:
        if must or not is_out_of_memory(error):
            raise
    empty_cache(device)  # here, where the error, which holds the computation's tensors, is gone
    return None


class _Windows:
    """The stages of `network` on one image O (3, H, W), `rows` rows at a time, or fewer where that is too many."""

    def __init__(self, network: nn.Module, O: Tensor, rows: int, room: Room):
        self.network, self.rows, self.room = network, rows, room
        self.O, self.image = O, O.cpu()
        self.gathered: Tensor | None = None  # (H, W, C) on the CPU, as all that is kept
        self.states: list[Tensor] = []  # of each layer, (H, W, planes)
        self.filters: dict = {}  # of all windows and stages
        self.state_shape: tuple[int, ...] = ()  # of a pixel's planes: (C, 4), or (C,) in ordinary networks

    def stage(self, first: bool, last: bool) -> Iterator[float]:
        """One stage; yields the share of its work done, after every window."""
        height, halo = self.O.shape[1], self.network.features_halo
        above = None if first else [state[:0] for state in self.states]  # the old states of the halo's rows
        top = 0
        while top < height:
            end = min(top + self.rows, height)
            found = _unless_out_of_memory(
                lambda: self._window(top, end, above),  # noqa: B023
                self.O.device,
                self.rows <= LEAST_ROWS,
            )
            if found is None:
                self.rows = max(LEAST_ROWS, self.rows // 2)
                log.debug(f"in windows of {self.rows} rows")
                continue
            gathered, states = found
            if self.gathered is None:
                self.gathered = self._room_for(gathered)
            self.gathered[top:end] = gathered
            if above is not None:
                both = zip(above, self.states, strict=True)
                above = [torch.cat([a, state[max(top, end - halo) : end]])[-halo:] for a, state in both]
            if not last and self.network.link != "none":
                self.states = self.states or [self._room_for(state) for state in states]
                for state, new in zip(self.states, states, strict=True):
                    state[top:end] = new
            self.room.release()
            yield (end - top) / height
            top = end

    def _window(self, top: int, end: int, above: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Rows `top` to `end` of the aggregated features and of the new states, each (rows, W, planes) on the CPU."""
        halo = self.network.features_halo
        low, high = max(top - halo, 0), min(end + halo, self.O.shape[1])
        states: list[Tensor | None] = [None] * len(self.network.re_layer)
        if above:
            both = zip(above, self.states, strict=True)
            windows = (torch.cat([a, state[top:high]]) for a, state in both)
            states = [
                window.to(self.O.device).permute(2, 0, 1)[None].unflatten(1, self.state_shape) for window in windows
            ]
        image = self.image[None, :, low:high].to(self.O.device).contiguous(memory_format=torch.channels_last)
        with shared_filters(self.filters):
            gathered, states = self.network.features(image, states)
        self.state_shape = states[0].shape[1:-2]
        rows = slice(top - low, end - low)

        def kept(x: Tensor) -> Tensor:  # (1, C, 4, h, W) or (1, C, h, W) to (rows, W, planes)
            return x.flatten(1, -3)[0, :, rows].permute(1, 2, 0).cpu()

        return kept(gathered), [kept(state) for state in states] if self.network.link != "none" else []

    def _room_for(self, part: Tensor) -> Tensor:
        """Zeros (H, W, planes) for what `part` (rows, W, planes) is a part of."""
        return self.room.zeros(self.O.shape[1], *part.shape[1:], dtype=part.dtype)

    def rain_layer(self) -> Tensor:
        """R (3, H, W) of the stage that is finished; the image becomes O - R, the next stage's input."""
        planes = self.gathered.permute(2, 0, 1)[None]  # (1, C, H, W)
        means = planes.mean((-2, -1)).to(self.O.device)
        R = torch.empty_like(self.O)
        for top in range(0, self.O.shape[1], self.rows):
            part = planes[:, :, top : top + self.rows].to(self.O.device, copy=True)
            R[:, top : top + self.rows] = self.network.rain_layer(part, means)[0]
        self.image = (self.O - R).cpu()
        return R

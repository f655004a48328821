"""A whole image of any size through a network on the CPU, in strips of rows that stay in the cache.

All layers follow one another through the image, each four rows behind the one before it, so that nothing is computed
twice and nothing but the states that pass from stage to stage is kept whole. These are kept as what the connections
make of them, the form in which the next stage needs them: the connection of layer l then has the same input as layer
l + 1, and one convolution makes both. Each state is overwritten while it is read: a layer writes rows only where the
layer that reads them has passed. The squeeze-and-excitation block needs the mean of the whole image; it stands at the
end of a stage, so that a stage is one pass.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memory import Room
from winograd import (
    CHUNK,
    HALO,
    KERNEL,
    TILE,
    from_band,
    multiply,
    tiles,
    to_band,
    transform_back,
    transform_filters,
    transform_windows,
    work,
)

BEHIND = TILE  # rows by which a layer is behind the one before it: one tile, which covers HALO


class Product(NamedTuple):
    matrices: Tensor  # (64, C, O): see winograd.transform_filters
    bias: Tensor  # (O)


class Position(NamedTuple):
    """What is made of one feature map x: the sums of the next layer, and the connection of x's own layer."""

    layer: Product | None  # None where the next layer is a pooling
    linked: Tensor | None  # (64, C, C): for the connected state that the next layer takes besides x
    connection: Product | None


def _positions(network: nn.Module) -> list[Position]:
    """The layers behind the first in the order in which they are computed. The residuals are part of the filters."""
    positions = []
    channels = network.re_layer[0].make_filters()[0].shape[0]
    identity = torch.zeros(channels, channels, KERNEL, KERNEL, dtype=torch.float64)
    identity[range(channels), range(channels), HALO, HALO] = 1
    for index, layer in enumerate([*network.re_layer, network.dec[0]]):
        product = linked = connection = None
        if hasattr(layer, "make_filters"):
            filters, bias = (x.double() for x in layer.make_filters())
            if index < len(network.re_layer):
                if network.link == "concat":
                    linked = transform_filters(filters[:, channels:])
                elif network.link == "add":
                    linked = transform_filters(filters + identity)
                filters = filters[:, :channels] + identity
            product = Product(transform_filters(filters), bias.float())
        if index and network.link != "none":
            filters, bias = network.connect_layers[index - 1].conv0.make_filters()
            connection = Product(transform_filters(filters), bias)
        positions.append(Position(product, linked, connection))
    return positions


class StripRunner:
    """The stages of `network` (a DSEN in eval mode, float32, CPU) on one image O (3, H, W) in [0, 1]."""

    def __init__(self, network: nn.Module, O: Tensor, room: Room):
        self.network, self.O, self.room = network, O, room
        self.slope = network.pre_layer.relu.negative_slope
        _, self.height, self.width = O.shape
        self.rows = TILE * tiles(self.height)  # of the image, in whole tiles
        self.columns = tiles(self.width)
        self.step = min(self.rows, TILE * max(1, round(CHUNK / self.columns)))
        self.positions = _positions(network)
        filters, self.first_bias = network.pre_layer.conv0.make_filters()
        self.first_filters = filters.contiguous(memory_format=torch.channels_last)
        channels, depth = filters.shape[0], len(network.re_layer)
        # x_0, x_1, ..: the rows of the strip, and those before it that the next layer still needs
        self.kept = BEHIND + HALO
        self.x = torch.zeros(depth + 1, self.kept + self.step, TILE, self.columns + 2, channels)
        room.reserve(4 * 4 * O.numel())  # image, rain layer, and what the caller makes of it
        self.image = O.new_zeros(self.height + 2 * HALO, self.width, 3)  # (H + 4, W, 3), zeros above and below
        self.image[HALO:-HALO] = O.permute(1, 2, 0)
        self.gathered = room.zeros(self.height, self.width, network.dec[-1].in_channels)  # what dec[0] makes of x_4
        self.states = None
        if network.link != "none":
            self.states = room.zeros(depth, self.rows + 2 * HALO, TILE, self.columns + 2, channels)
        self.first_sums: dict[int, Tensor] = {}

    def stage(self, first: bool, last: bool) -> Iterator[float]:
        """One stage, which changes the states and the image; yields the share of its work done, after every strip."""
        self.x.zero_()
        strips = range(0, self.rows + BEHIND * len(self.positions), self.step)  # the last layer is so far behind
        for start in strips:
            self._first_layer(start)
            for index in range(len(self.positions)):
                self._position(index, start - BEHIND * (index + 1), first, last)
            self.room.release()
            yield 1 / len(strips)
        self.first_sums.clear()

    def rain_layer(self) -> Tensor:
        """R (3, H, W) of the stage that is finished; the image becomes O - R, the next stage's input."""
        planes = self.gathered.permute(2, 0, 1)[None]  # (1, C, H, W), channels-last
        means = planes.mean((-2, -1))
        R = torch.empty_like(self.O)
        for top in range(0, self.height, self.step):
            R[:, top : top + self.step] = self.network.rain_layer(planes[:, :, top : top + self.step], means)[0]
        torch.sub(self.O.permute(1, 2, 0), R.permute(1, 2, 0), out=self.image[HALO:-HALO])
        return R

    def _clear_outside(self, rows: Tensor, end: int) -> None:
        """Zeros in the last tile beyond the image's width and, of `rows` that end at image row `end`, its height."""
        if self.width % TILE:
            rows[:, self.width % TILE :, -2] = 0
        if end > self.height:
            rows[self.height - end :] = 0

    def _new_rows(self, index: int) -> Tensor:
        """Makes room in x_index: moves the rows that are needed yet to the front. Returns the place of the strip."""
        x = self.x[index]
        x[: self.kept].copy_(x[-self.kept :].clone())
        return x[self.kept :]

    def _first_layer(self, start: int) -> None:
        place = self._new_rows(0)
        end = min(start + self.step, self.height)
        if start >= end:
            place.zero_()
            return
        rows = self.image[start : end + 2 * HALO].permute(2, 0, 1)[None]
        x = F.conv2d(rows, self.first_filters, self.first_bias, padding=(0, HALO))
        to_band([F.leaky_relu_(x, self.slope)[0].permute(1, 2, 0)], place)
        place[end - start :] = 0

    def _position(self, index: int, start: int, first: bool, last: bool) -> None:
        """What is made of x_index in as many rows from `start` on as a strip has and the image holds."""
        final = index == len(self.positions) - 1
        place = None if final else self._new_rows(index + 1)
        if place is not None:
            place.zero_()
        top, end = max(start, 0), min(start + self.step, self.rows)
        if top >= end:
            return
        position = self.positions[index]
        inputs = self.x[index][top - start : end - start + 2 * HALO]
        connects = position.connection is not None and not last
        if connects or position.layer:
            values = transform_windows(inputs)
        if connects:
            rows = F.leaky_relu_(self._rows(multiply(values, *position.connection)), self.slope)
            self._put(rows, self.states[index - 1, HALO + top : HALO + end], end)
        if position.layer:
            product = multiply(values, *position.layer)
            if position.linked is not None:
                if first:
                    product += self._first_linked(index, top, end)
                else:
                    states = transform_windows(self.states[index, top : end + 2 * HALO])
                    multiply(states, position.linked, onto=product)
            rows = self._rows(product)
        else:
            x = inputs[HALO:-HALO, :, 1:-1]  # (n, 4, tiles, C * 4)
            rows = self.network.dec[0](x.flatten(0, 2).unflatten(1, (-1, 4))).view(*x.shape[:3], -1)
        if final:
            from_band(rows, self.gathered[top : min(end, self.height)])
        else:
            self._put(F.leaky_relu_(rows, self.slope), place[top - start : end - start], end)

    def _first_linked(self, index: int, top: int, end: int) -> Tensor:
        """What layer `index` takes from the states before stage 1, rows `top` to `end`: (8, 8, n / 4, tiles, C).

        These states are zeros, of which the connection leaves LeakyReLU(bias) everywhere within the image. So all
        strips that do not touch the image's upper or lower edge have it in common.
        """
        inside = top >= HALO and end + HALO <= self.height and end - top == self.step
        if inside and index in self.first_sums:
            return self.first_sums[index]
        band = self.x.new_zeros(end - top + 2 * HALO, *self.x.shape[2:])
        rows = band[max(HALO - top, 0) : self.height + HALO - top]
        rows[:, :, 1:-1] = F.leaky_relu(self.network.connect_layers[index].conv0.make_filters()[1], self.slope)
        self._clear_outside(rows, 0)
        values = transform_windows(band)
        linked = self.positions[index].linked
        sums = multiply(values, linked, onto=values.new_zeros(*values.shape[:-1], linked.shape[2]))
        if inside:
            self.first_sums[index] = sums
        return sums

    def _rows(self, product: Tensor) -> Tensor:
        """The rows (n, 4, tiles, O) of a product (8, 8, n / 4, tiles, O)."""
        rows = work("rows", TILE * product.shape[2], TILE, *product.shape[3:])
        transform_back(product, rows)
        return rows

    def _put(self, rows: Tensor, band: Tensor, end: int) -> None:
        band[:, :, 1:-1] = rows
        self._clear_outside(band, end)


@torch.no_grad()
def each_stage(
    network: nn.Module,
    O: Tensor,
    stage_num: int,
    memory_gib: float = 0.0,
    tick: Callable[[float], object] = lambda share: None,
) -> Iterator[Tensor]:
    """The rain layer R_t (3, H, W) of every stage; see `StripRunner` for network and O.

    `memory_gib` bounds the memory of the whole process, 0: what is free. `tick` hears the share of the work done.
    """
    runner = StripRunner(network, O, Room(memory_gib))
    for t in range(stage_num):
        for share in runner.stage(first=t == 0, last=t == stage_num - 1):
            tick(share / stage_num)
        yield runner.rain_layer()

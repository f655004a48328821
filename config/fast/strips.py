"""A whole image of any size through a network on the CPU, in strips of rows that stay in the cache.

All layers follow one another through the image, each four rows behind the one before it, so that nothing is computed
twice and nothing but the states that pass from stage to stage is kept whole. These are kept as what the connections
make of them, the form in which the next stage needs them: the connection of layer l then has the same input as layer
l + 1. Each state is overwritten while it is read: a layer writes rows only where the layer that reads them has passed.
The squeeze-and-excitation block needs the mean of the whole image; it stands at the end of a stage, so that a stage is
one pass.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast.memory import Room
from fast.winograd import HALO, KERNEL, TILE, Product, convolve_bands, from_band, tiles, to_band, transform_filters

CHUNK = 512  # tiles of a strip, about
BEHIND = TILE  # rows by which a layer is behind the one before it: one tile, which covers HALO


class Kernel(NamedTuple):
    """A convolution, as `winograd.Product` takes it."""

    matrices: Tensor  # (64, I, O)
    bias: Tensor  # (O)


class Position(NamedTuple):
    """What is made of one feature map x: the next layer, and the connection of x's own layer."""

    layer: Kernel | None  # of x and, in networks with links, of the connected state; None where it is a pooling
    connection: Kernel | None


def _positions(network: nn.Module) -> list[Position]:
    """The layers behind the first in the order in which they are computed. The residuals are part of the filters."""
    positions = []
    channels = network.re_layer[0].make_filters()[0].shape[0]
    identity = torch.zeros(channels, channels, KERNEL, KERNEL, dtype=torch.float64)
    identity[range(channels), range(channels), HALO, HALO] = 1
    for index, layer in enumerate([*network.re_layer, network.dec[0]]):
        kernel = connection = None
        if hasattr(layer, "make_filters"):
            filters, bias = (x.double() for x in layer.make_filters())
            if index < len(network.re_layer):
                own = filters[:, :channels] + identity
                linked = {"none": [], "concat": [filters[:, channels:]], "add": [own]}[network.link]
                filters = torch.cat([own, *linked], 1)
            kernel = Kernel(transform_filters(filters), bias.float())
        if index and network.link != "none":
            filters, bias = network.connect_layers[index - 1].conv0.make_filters()
            connection = Kernel(transform_filters(filters), bias)
        positions.append(Position(kernel, connection))
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
            for state, connection in zip(self.states, network.connect_layers, strict=True):
                # The states before stage 1 are zeros, of which the connection leaves this everywhere within the image.
                state[HALO:-HALO, :, 1:-1] = F.leaky_relu(connection.conv0.make_filters()[1], self.slope)
                self._clear_outside(state[HALO:-HALO], self.rows)

    def stage(self, last: bool) -> Iterator[float]:
        """One stage, which changes the states and the image; yields the share of its work done, after every strip."""
        self.x.zero_()
        strips = range(0, self.rows + BEHIND * len(self.positions), self.step)  # the last layer is so far behind
        for start in strips:
            self._first_layer(start)
            for index in range(len(self.positions)):
                self._position(index, start - BEHIND * (index + 1), last)
            self.room.release()
            yield 1 / len(strips)

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

    def _position(self, index: int, start: int, last: bool) -> None:
        """What is made of x_index in as many rows from `start` on as a strip has and the image holds."""
        final = index == len(self.positions) - 1
        place = None if final else self._new_rows(index + 1)
        if place is not None:
            place.zero_()
        top, end = max(start, 0), min(start + self.step, self.rows)
        if top >= end:
            return
        position = self.positions[index]
        inputs = [self.x[index][top - start : end - start + 2 * HALO]]
        if self.states is not None and not final:
            inputs.append(self.states[index, top : end + 2 * HALO])
        products, activated = [], []
        if position.connection is not None and not last:
            activated.append(self.states[index - 1, HALO + top : HALO + end])
            products.append(Product(1, *position.connection, activated[0][:, :, 1:-1]))
        if position.layer is not None:
            out = self.gathered[top:end] if final else place[top - start : end - start, :, 1:-1]
            products.append(Product(len(inputs), *position.layer, out))
            if not final:
                activated.append(place[top - start : end - start])
        if products:
            convolve_bands(inputs, products)
        for band in activated:
            F.leaky_relu_(band, self.slope)
            self._clear_outside(band, end)
        if position.layer is None:
            x = inputs[0][HALO:-HALO, :, 1:-1]  # (n, 4, tiles, C * 4)
            rows = self.network.dec[0](x.flatten(0, 2).unflatten(1, (-1, 4))).view(*x.shape[:3], -1)
            from_band(rows, self.gathered[top:end])


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
        for share in runner.stage(last=t == stage_num - 1):
            tick(share / stage_num)
        yield runner.rain_layer()

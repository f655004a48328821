"""A whole image through DSEN on the CPU, in strips of rows that stay in the cache.

All layers follow one another through the image, each four rows behind the one before it, so that nothing is computed
twice and nothing but the states, which pass from stage to stage, is kept whole. A state is stored as the output of its
connection, which has the same input as the next layer. States are overwritten after the layer that reads them.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.devices import autocast_dtype
from fast import winograd
from fast.memory import MemoryBudget
from fast.winograd import HALO, KERNEL, TILE, convolve_bands, from_band, tiles, to_band, transform_filters

STRIP_TILES = 512  # of a strip, about
LAG = TILE  # rows by which a layer is behind the one before it: one tile, which covers HALO


def fit(network: nn.Module, O: Tensor) -> bool:
    """Whether `Strips` can take the image `O` through `network`: in float32 on the CPU, by the compiled library."""
    return (
        O.device.type == "cpu"
        and O.dtype == network.pre_layer.conv0.weight.dtype == torch.float32
        and autocast_dtype(O) is None
        and network.dec[-1].in_channels >= winograd.CHANNELS
        and winograd.library() is not None
    )


class Strips:
    """The stages of `network` (a DSEN, see `fit`) on one image O (3, H, W) in [0, 1]."""

    def __init__(self, network: nn.Module, O: Tensor, memory: MemoryBudget):
        self.network, self.memory = network, memory
        self.slope = network.pre_layer.relu.negative_slope
        _, self.height, self.width = O.shape
        self.image_rows = TILE * tiles(self.height)
        self.columns = tiles(self.width)
        self.rows = min(self.image_rows, TILE * max(1, round(STRIP_TILES / self.columns)))
        links = network.connect_layers if network.link != "none" else []
        self.layers, self.connections = _layers(network), [_matrices(link.conv0) for link in links]
        filters, self.first_bias = network.pre_layer.conv0.make_filters()
        self.first_filters = filters.contiguous(memory_format=torch.channels_last)
        channels, depth = filters.shape[0], len(network.re_layer)
        # x_0, x_1, ..: bands of the strip's rows, and of the rows before it that the next layer still needs
        self.overlap = LAG + HALO
        self.x = torch.zeros(depth + 1, self.overlap + self.rows, TILE, self.columns + 2, channels)
        self.image = O.new_zeros(self.height + 2 * HALO, self.width, 3)  # (H + 4, W, 3), zeros above and below
        self.set_image(O)
        self.features = memory.zeros(self.height, self.width, network.dec[-1].in_channels)  # output of dec[0]
        self.states = memory.zeros(len(links), self.image_rows + 2 * HALO, TILE, self.columns + 2, channels)
        for state, (_, bias) in zip(self.states, self.connections, strict=True):
            # The states before stage 1 are zeros; their connection is LeakyReLU(bias) everywhere in the image.
            state[HALO:-HALO, :, 1:-1] = F.leaky_relu(bias, self.slope)
            self._clear_outside(state[HALO:-HALO], self.image_rows)

    def set_image(self, image: Tensor) -> None:
        """The input (3, H, W) of the next stage."""
        self.image[HALO:-HALO] = image.permute(1, 2, 0)

    def stage(self, last: bool) -> Iterator[float]:
        """One stage, which updates features and states; yields the share of its work done, after every strip."""
        self.x.zero_()
        strips = range(0, self.image_rows + LAG * len(self.layers), self.rows)  # to the end of the last layer
        for top in strips:
            self._first_layer(top)
            for index in range(len(self.layers)):
                self._layer(index, top - LAG * (index + 1), last)
            self.memory.release()
            yield 1 / len(strips)

    def _first_layer(self, top: int) -> None:
        """x_0 in the strip's rows from `top` on."""
        band = self._next_rows(0)
        end = min(top + self.rows, self.height)
        if top < end:
            rows = self.image[top : end + 2 * HALO].permute(2, 0, 1)[None]
            x = F.conv2d(rows, self.first_filters, self.first_bias, padding=(0, HALO))
            to_band(F.leaky_relu_(x, self.slope)[0].permute(1, 2, 0), band)

    def _layer(self, index: int, top: int, last: bool) -> None:
        """x_{index + 1}, or the features, and the state for the next stage from x_index, in the rows from `top` on."""
        to_features = index == len(self.layers) - 1
        band = None if to_features else self._next_rows(index + 1)
        start, end = max(top, 0), min(top + self.rows, self.image_rows)
        if start >= end:
            return
        inputs = [self.x[index][start - top : end - top + 2 * HALO]]
        if index and self.connections and not last:
            state = self.states[index - 1, HALO + start : HALO + end]
            self._convolve(inputs, *self.connections[index - 1], state, end)
        if not to_features:
            linked = [self.states[index, start : end + 2 * HALO]] if self.connections else []
            self._convolve(inputs + linked, *self.layers[index], band[start - top : end - top], end)
        elif self.layers[index] is not None:
            convolve_bands(inputs, *self.layers[index], self.features[start:end])
        else:  # orientation pooling
            x = inputs[0][HALO:-HALO, :, 1:-1]  # (n, 4, tiles, C * 4)
            pooled = self.network.dec[0](x.flatten(0, 2).unflatten(1, (-1, 4)))  # (n * 4 * tiles, C)
            from_band(pooled.view(*x.shape[:3], -1), self.features[start:end])

    def _convolve(self, inputs: list[Tensor], matrices: Tensor, bias: Tensor, band: Tensor, end: int) -> None:
        """A convolution and its activation into `band`, whose rows end at image row `end`."""
        convolve_bands(inputs, matrices, bias, band[:, :, 1:-1])
        F.leaky_relu_(band, self.slope)
        self._clear_outside(band, end)

    def _next_rows(self, index: int) -> Tensor:
        """The rows of x_index for the strip, zeros yet, behind those of the last strip that are still needed."""
        x = self.x[index]
        x[: self.overlap].copy_(x[-self.overlap :].clone())
        return x[self.overlap :].zero_()

    def _clear_outside(self, band: Tensor, end: int) -> None:
        """Zeros outside the image, in the last tile and in the last rows of a band that ends at image row `end`."""
        if self.width % TILE:
            band[:, self.width % TILE :, -2] = 0
        if end > self.height:
            band[self.height - end :] = 0


def _layers(network: nn.Module) -> list[tuple[Tensor, Tensor] | None]:
    """Matrices and bias of the layers behind the first, the residuals included; None for orientation pooling."""
    channels = network.pre_layer.conv0.make_filters()[0].shape[0]
    identity = torch.zeros(channels, channels, KERNEL, KERNEL, dtype=torch.float64)
    identity[range(channels), range(channels), HALO, HALO] = 1
    layers: list[tuple[Tensor, Tensor] | None] = []
    for layer in network.re_layer:
        filters, bias = layer.make_filters()
        own = filters.double()[:, :channels] + identity
        linked = {"none": [], "concat": [filters.double()[:, channels:]], "add": [own]}[network.link]
        layers.append((transform_filters(torch.cat([own, *linked], 1)), bias))
    return [*layers, _matrices(network.dec[0]) if hasattr(network.dec[0], "make_filters") else None]


def _matrices(layer: nn.Module) -> tuple[Tensor, Tensor]:
    filters, bias = layer.make_filters()
    return transform_filters(filters), bias

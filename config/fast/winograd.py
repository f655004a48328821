"""5x5 convolution on the CPU with 6.25 times fewer multiplications: Winograd's minimal filtering F(4x4, 5x5).

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016. A filter and a window of the image are
polynomials, and the convolution is their product, which is fixed by its values at enough points: eight for a 5-tap
filter and a window of eight, which make four outputs in one dimension. So each tile of 4x4 pixels and its window of 8x8
are taken to the 64 pairs of points by sums alone, there meet the filters in 64 matrix products over the channels, and
are brought back. In the mean, one layer rounds eight times as coarsely as the direct float32 convolution, a whole
network less than twice (tests/test_winograd.py, bench/NOTES.md).

All this is here in torch; where there is a compiler, winograd.cpp does the same faster (native.py). Here the sums run
over long pieces of memory because columns are kept by their place in the tile. A band of image rows is
(rows, 4, tiles + 2, C): place in the tile, tile, channel, with a tile of zeros at either end.
"""

import math
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fast import native

TILE = 4  # outputs of one tile in each dimension
KERNEL = 5
HALO = KERNEL // 2
POINTS = 8  # TILE + KERNEL - 1 points: 0, 1, -1, 2, -2, 1/2, -1/2, infinity
LINE = 16  # float32 numbers in a line of the cache
CHUNK = 256  # tiles that are worked on at once in torch: their 64 values a channel stay in a cache of some megabytes

# Filter taps to their values at the points, each divided by what `_to_points` leaves out.
_SCALES = (1, -4.5, -4.5, 360, 360, 1.40625, 1.40625)
_FILTER = torch.tensor(
    [[p**k / scale for k in range(KERNEL)] for p, scale in zip((0, 1, -1, 2, -2, 0.5, -0.5), _SCALES, strict=True)]
    + [[0, 0, 0, 0, 1]],
    dtype=torch.float64,
)


def transform_filters(filters: Tensor) -> Tensor:
    """Filters (O, I, 5, 5) as the matrices (64, I, O) that the windows' values are multiplied with."""
    points = _FILTER.to(filters.device)
    values = points @ filters.double() @ points.T  # (O, I, 8, 8)
    return values.permute(2, 3, 1, 0).flatten(0, 1).to(torch.float32).contiguous()  # (64, I, O)


def tiles(length: int) -> int:
    """Tiles that cover `length` pixels."""
    return -(-length // TILE)


class Workspace(threading.local):
    """Memory that a thread uses again and again: fresh memory would cost as much time as the sums themselves."""

    def __init__(self):
        self.kept: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """A float32 tensor of `shape` with any content, in the place of the last one of this name."""
        return self._memory(name, math.prod(shape)).view(shape)

    def values(self, name: str, *shape: int) -> Tensor:
        """The same for values at the points: (8, 8, *shape)."""
        count = math.prod(shape)
        # An odd number of lines of the cache apart: 64 addresses in steps of a power of two would share one place of it
        step = LINE * (-(-count // LINE) | 1)
        return self._memory(name, POINTS**2 * step).view(POINTS, POINTS, step)[..., :count].unflatten(2, shape)

    def _memory(self, name: str, count: int) -> Tensor:
        kept = self.kept.get(name)
        if kept is None or kept.numel() < count:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be used in training
                kept = self.kept[name] = torch.empty(count)
        return kept[:count]


work = Workspace()


def _to_points(x: list[Tensor], out: list[Tensor], odd: Tensor) -> None:
    """Eight pixels of a window to their values at the points, in one dimension; `odd` is overwritten.

    A value at p and one at -p are the sum and the difference of even and odd terms.
    """
    torch.sub(x[4], x[2], out=out[0])
    torch.add(x[0], out[0], alpha=5.25, out=out[0]).sub_(x[6])
    torch.sub(x[3], x[5], out=out[7])
    torch.add(x[7], out[7], alpha=5.25, out=out[7]).sub_(x[1])
    for plus, first, last, middle, scale in ((1, 1, 1, -4.25, 1), (3, 1, 4, -5, 2), (5, 4, 1, -5, 0.5)):
        even = out[plus]
        for sums, low in ((even, 2), (odd, 1)):  # first * x[low] + middle * x[low + 2] + last * x[low + 4]
            a, b = (low + 4, low) if last == 1 else (low, low + 4)
            torch.add(x[a], x[b], alpha=first * last, out=sums).add_(x[low + 2], alpha=middle)
        torch.sub(even, odd, alpha=scale, out=out[plus + 1])
        even.add_(odd, alpha=scale)


def _from_points(m: list[Tensor], out: list[Tensor], spare: Tensor) -> None:
    """Eight values at the points to four outputs, in one dimension; `m` and `spare` are overwritten."""
    sums, differences = [], []
    for i, free in ((1, spare), (3, m[2]), (5, m[4])):
        sums.append(torch.add(m[i], m[i + 1], out=free))
        differences.append(m[i].sub_(m[i + 1]))
    torch.add(m[0], sums[0], out=out[0]).add_(sums[1]).add_(sums[2])
    torch.add(differences[0], differences[1], alpha=2, out=out[1]).add_(differences[2], alpha=0.5)
    torch.add(sums[0], sums[1], alpha=4, out=out[2]).add_(sums[2], alpha=0.25)
    torch.add(m[7], differences[0], out=out[3]).add_(differences[1], alpha=8).add_(differences[2], alpha=0.125)


def _from_points_transposed(y: list[Tensor], out: list[Tensor], odd: Tensor) -> None:
    """The transpose of `_from_points`, by which its gradient flows: four to eight; `odd` is overwritten."""
    out[0].copy_(y[0])
    out[7].copy_(y[3])
    for plus, p in ((1, 1), (3, 2), (5, 0.5)):
        even = torch.add(y[0], y[2], alpha=p * p, out=out[plus])
        torch.add(y[1], y[3], alpha=p * p, out=odd)
        torch.sub(even, odd, alpha=p, out=out[plus + 1])
        even.add_(odd, alpha=p)


def _with_images(band: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Both with a dimension for the images, where they are of one image without it."""
    return (band, values) if band.dim() == 5 else (band[None], values.unsqueeze(2))


def transform_windows(band: Tensor) -> Tensor:
    """Windows around all tiles of a band with its halo: (..., rows + 4, 4, tiles + 2, C) to (8, 8, ..., rows / 4,
    tiles, C), both dimensions at the points. The next call overwrites the result."""
    *images, rows, _, width, channels = band.shape
    columns, count = width - 2, (rows - 2 * HALO) // TILE
    values = work.values("V", *images, count, columns, channels)
    if native.fits(band):
        band, of_images = _with_images(band, values)
        native.run("windows_to_values", [band], of_images, 0, TILE - HALO)
        return values
    x = [band[..., p, t : t + columns, :] for t, p in ((0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1))]
    by_column = work("columns", POINTS, *images, rows, columns, channels)
    _to_points(x, list(by_column), work("odd", *images, rows, columns, channels))
    y = [by_column[..., j : j + TILE * (count - 1) + 1 : TILE, :, :] for j in range(POINTS)]
    _to_points(y, list(values), work("odd", POINTS, *images, count, columns, channels))
    return values


def transform_back(values: Tensor, out: Tensor) -> None:
    """Values (8, 8, ..., count, tiles, C) to the rows `out` (..., 4 * count, 4, tiles, C); `values` is overwritten."""
    *_, count, columns, channels = values.shape
    images = values.shape[2:-3]
    if native.fits(out):
        out, of_images = _with_images(out, values)
        native.run("values_to_tiles", [out], of_images, 0, 0)
        return
    by_column = work("back", TILE, POINTS, *images, count, columns, channels)
    _from_points(list(values), list(by_column), work("odd", POINTS, *images, count, columns, channels))
    tile_rows = out.unflatten(-4, (count, TILE)).movedim(-4, 0)  # (4, ..., count, 4, tiles, C)
    outputs = [tile_rows[..., place, :, :] for place in range(TILE)]
    _from_points(list(by_column.unbind(1)), outputs, work("odd", TILE, *images, count, columns, channels))


def _values_of_gradient(rows: Tensor) -> Tensor:
    """The transpose of `transform_back`: (..., 4 * count, 4, tiles, C) to (8, 8, ..., count, tiles, C)."""
    *images, height, _, columns, channels = rows.shape
    by_column = work("columns", POINTS, *images, height, columns, channels)
    spare = work("odd", *images, height, columns, channels)
    _from_points_transposed([rows[..., p, :, :] for p in range(TILE)], list(by_column), spare)
    values = work.values("dM", *images, height // TILE, columns, channels)
    y = [by_column[..., j::TILE, :, :] for j in range(TILE)]
    _from_points_transposed(y, list(values), work("odd", POINTS, *images, height // TILE, columns, channels))
    return values


def to_band(inputs: list[Tensor], band: Tensor, first_row: int = 0) -> None:
    """Write images (..., H, W, C), side by side in the channels, into a band of zeros from row `first_row` on."""
    done = 0
    for x in inputs:
        height, width, channels = x.shape[-3:]
        for place in range(min(TILE, width)):
            columns = x[..., place::TILE, :]
            target = band[..., first_row : first_row + height, place, 1 : 1 + columns.shape[-2], :]
            target[..., done : done + channels].copy_(columns)
        done += channels


def from_band(rows: Tensor, out: Tensor) -> None:
    """Rows (..., H', 4, tiles, C) without the zeros at the ends to images `out` (..., H, W, C), H <= H'."""
    height, width = out.shape[-3:-1]
    for place in range(min(TILE, width)):
        columns = out[..., place::TILE, :]
        columns.copy_(rows[..., :height, place, : columns.shape[-2], :])


def _chunks(number: int, height: int, width: int) -> Iterator[tuple[slice, int, int]]:
    """`number` images in pieces of about CHUNK tiles: (images, first row, end row), whole images or rows of one."""
    images = max(1, CHUNK // (tiles(height) * tiles(width)))
    rows = TILE * (tiles(height) if images > 1 else max(1, CHUNK // tiles(width)))
    for first_image in range(0, number, images):
        for first_row in range(0, height, rows):
            yield slice(first_image, first_image + images), first_row, min(first_row + rows, height)


def _band(name: str, inputs: list[Tensor], chunk: tuple[slice, int, int], halo: int) -> Tensor:
    """The band of one of `_chunks`, with `halo` rows more above and below, zeros where the images have no pixels."""
    images, first, end = chunk
    width = inputs[0].shape[2]
    parts = [x[images, max(first - halo, 0) : end + halo] for x in inputs]
    channels = sum(x.shape[-1] for x in inputs)
    band = work(name, len(parts[0]), TILE * tiles(end - first) + 2 * halo, TILE, tiles(width) + 2, channels).zero_()
    to_band(parts, band, halo - min(first, halo))
    return band


def _convolve(inputs: list[Tensor], matrices: Tensor, bias: Tensor | None, *channels: int) -> list[Tensor]:
    """Images (N, H, W, I), together the channels of `matrices` (64, I, O), to images (N, C, H, W), together O.

    They are in channels-last memory.
    """
    number, height, width = inputs[0].shape[:3]
    results = [torch.empty(number, count, height, width, memory_format=torch.channels_last) for count in channels]
    images = [x.permute(0, 2, 3, 1) for x in results]
    if native.fits(*inputs, *images):
        native.convolve(inputs, images, matrices, bias)
        return results
    for chunk in _chunks(number, height, width):
        values = multiply(transform_windows(_band("band", inputs, chunk, HALO)), matrices, bias)
        rows = work("rows", *values.shape[2:3], TILE * values.shape[3], TILE, *values.shape[4:])
        transform_back(values, rows)
        for part, image in zip(rows.split(channels, -1), images, strict=True):
            from_band(part, image[chunk[0], chunk[1] : chunk[2]])
    return results


class Product(NamedTuple):
    """A convolution of bands of one image, of which several may read the same ones."""

    bands: int  # it reads so many of the first, side by side in the channels
    matrices: Tensor  # (64, I, O): see `transform_filters`
    bias: Tensor | None  # (O)
    out: Tensor  # where its result goes: a band's inner part (rows, 4, tiles, O), or an image (H, W, O), H <= rows


def convolve_bands(bands: list[Tensor], products: list[Product]) -> None:
    """Convolutions of bands (rows + 4, 4, tiles + 2, I), each with its halo, that write their results."""
    if native.fits(*bands, *(product.out for product in products)):
        for count, matrices, bias, out in products:
            native.convolve([band[None] for band in bands[:count]], [out[None]], matrices, bias, 0, TILE - HALO)
        return
    sums: list[Tensor | None] = [None] * len(products)
    first = 0
    for number, band in enumerate(bands):
        values, end = transform_windows(band), first + band.shape[-1]
        for place, (count, matrices, bias, _) in enumerate(products):
            if number == 0:
                out = work.values(f"M{place}", *values.shape[2:-1], matrices.shape[2])
                sums[place] = multiply(values, matrices[:, :end], bias, out)
            elif number < count:
                multiply(values, matrices[:, first:end], out=sums[place], add=True)
        first = end
    for product, summed in zip(products, sums, strict=True):
        rows = work("rows", TILE * summed.shape[2], TILE, *summed.shape[3:])
        transform_back(summed, rows)
        if product.out.dim() == rows.dim():
            product.out.copy_(rows)
        else:
            from_band(rows, product.out)


def multiply(
    values: Tensor, matrices: Tensor, bias: Tensor | None = None, out: Tensor | None = None, add: bool = False
) -> Tensor:
    """The 64 products over the channels: (8, 8, ..., C) and (64, C, O) to (8, 8, ..., O), with the bias added.

    They are written to `out`, or added to it, or else lie in memory that the next call overwrites.
    """
    channels, results = matrices.shape[1:]
    product = work.values("M", *values.shape[2:-1], results) if out is None else out
    if native.multiplies(matrices):
        native.multiply(values, matrices, product, add)
    else:
        factors = values.view(POINTS**2, -1, channels), matrices
        flat = product.view(POINTS**2, -1, results)
        flat.baddbmm_(*factors) if add else torch.bmm(*factors, out=flat)
    if bias is not None:
        product[1, 1] += bias  # the value at the points (1, 1) goes into all outputs alike
    return product


class Convolution(torch.autograd.Function):
    """Convolution of the images `inputs`, taken side by side in the channels, with its gradients.

    The gradient of the input is a convolution again, that of the matrices the product of both sides' values. Gradients
    that are to have gradients themselves are the direct convolution's, with respect to the filters.
    """

    @staticmethod
    def forward(made, matrices: Tensor, filters: Tensor, bias: Tensor | None, *inputs: Tensor) -> Tensor:
        """`made` are the `convolution.Filters` that hold `matrices` (64, I, O), of `filters` (O, I, 5, 5)."""
        return _convolve([x.permute(0, 2, 3, 1) for x in inputs], matrices, bias, matrices.shape[2])[0]

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.made, _, filters, _, *images = inputs
        ctx.save_for_backward(filters, *images)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        filters, *inputs = ctx.saved_tensors
        with_images, with_bias = any(ctx.needs_input_grad[4:]), ctx.needs_input_grad[3]
        d_inputs: list[Tensor | None] = [None] * len(inputs)
        channels = [x.shape[1] for x in inputs]
        if torch.is_grad_enabled():  # second-order gradients are asked for
            needs = [with_images, ctx.needs_input_grad[2], with_bias]
            d_x, d_filters, d_bias = torch.ops.aten.convolution_backward(
                gradient, torch.cat(inputs, 1), filters, [len(filters)], [1, 1], [HALO, HALO], [1, 1], False, [0, 0], 1,
                needs,
            )  # fmt: skip
            return None, None, d_filters, d_bias, *(d_inputs if d_x is None else d_x.split(channels, 1))
        d_matrices = d_bias = None
        gradient = gradient.permute(0, 2, 3, 1)
        if with_images:
            d_inputs = _convolve([gradient], ctx.made.turned, None, *channels)
        if ctx.needs_input_grad[1]:
            d_matrices = _matrices_gradient([x.permute(0, 2, 3, 1) for x in inputs], gradient)
        if with_bias:
            d_bias = gradient.sum((0, 1, 2))
        return None, d_matrices, None, d_bias, *d_inputs


def _matrices_gradient(inputs: list[Tensor], gradient: Tensor) -> Tensor:
    """Gradient (64, I, O) of the matrices from the inputs (N, H, W, I) and the output's gradient (N, H, W, O)."""
    if native.fits(*inputs, gradient):
        return native.matrices_gradient(inputs, gradient)
    number, height, width, results = gradient.shape
    channels = sum(x.shape[-1] for x in inputs)
    total = gradient.new_zeros(POINTS**2, channels, results)
    for chunk in _chunks(number, height, width):
        values = transform_windows(_band("band", inputs, chunk, HALO)).view(POINTS**2, -1, channels)
        d_product = _values_of_gradient(_band("rows", [gradient], chunk, 0)[..., 1:-1, :])
        total.baddbmm_(values.transpose(1, 2), d_product.view(POINTS**2, -1, results))
    return total

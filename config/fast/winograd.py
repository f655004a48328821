"""5x5 convolution on the CPU with 6.25 times fewer multiplications: Winograd's minimal filtering F(4x4, 5x5).

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016. A convolution in one dimension is a
product of polynomials, which its values at enough points determine: eight points for five filter taps and four outputs.
So a tile of 4x4 outputs needs an 8x8 window of the input. Sums take the window to its values at the 64 pairs of points,
64 matrix products over the channels apply the filters, and sums lead back to the tile. winograd.cpp does all this;
native.py compiles it.

A band is the memory layout that strips.py keeps image rows in: (rows, 4, tiles + 2, C), that is, place within the tile,
tile, channel, with a tile of zeros at either end.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fast import native

TILE = 4  # outputs of one tile in each dimension
KERNEL = 5
HALO = KERNEL // 2  # pixels to each side of one that its output depends on

# Filter taps to their values at the points 0, 1, -1, 2, -2, 1/2, -1/2 and infinity, each divided by a factor that
# `to_points` in winograd.cpp leaves out.
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


def to_band(image: Tensor, band: Tensor) -> None:
    """Write an image (H, W, C) into the first rows of a band of zeros."""
    height, width = image.shape[:2]
    for place in range(min(TILE, width)):
        columns = image[:, place::TILE]
        band[:height, place, 1 : 1 + columns.shape[1]] = columns


def from_band(rows: Tensor, image: Tensor) -> None:
    """Write the rows (H', 4, tiles, C) of a band, without the zeros at its ends, to an image (H, W, C), H <= H'."""
    height, width = image.shape[:2]
    for place in range(min(TILE, width)):
        columns = image[:, place::TILE]
        columns.copy_(rows[:height, place, : columns.shape[1]])


def convolve_bands(bands: Sequence[Tensor], matrices: Tensor, bias: Tensor, out: Tensor) -> None:
    """Convolve bands (rows + 4, 4, tiles + 2, I_k), side by side in the channels, each with its halo.

    `matrices` (64, I, O), I the sum of all I_k. The result goes to `out`: the inner part (rows, 4, tiles, O) of a band,
    or an image (H, W, O) with H <= rows.
    """
    native.convolve([band[None] for band in bands], [out[None]], matrices, bias, 0, TILE - HALO)


class Convolution(torch.autograd.Function):
    """Convolution of the images `inputs`, side by side in the channels, with its gradients.

    The gradient of the input is a convolution again. Second-order gradients are those of PyTorch's convolution, with
    respect to the filters.
    """

    @staticmethod
    def forward(
        transposed: Callable[[], Tensor], matrices: Tensor, weight: Tensor, bias: Tensor | None, *inputs: Tensor
    ) -> Tensor:
        """Of inputs (N, I_k, H, W) and the filters `weight` (O, I, 5, 5), whose `matrices` are (64, I, O).

        `transposed()` are the matrices (64, O, I) that take the output's gradient to the input's.
        """
        return _convolve(inputs, matrices, bias, [len(weight)])[0]

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.transposed, _, weight, _, *images = inputs
        ctx.save_for_backward(weight, *images)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        weight, *inputs = ctx.saved_tensors
        _, needs_matrices, needs_weight, needs_bias, *needs_inputs = ctx.needs_input_grad
        channels = [x.shape[1] for x in inputs]
        d_inputs: Sequence[Tensor | None] = [None] * len(inputs)
        d_matrices = d_weight = d_bias = None
        if torch.is_grad_enabled():  # for second-order gradients
            needs = [any(needs_inputs), needs_weight, needs_bias]
            images, sizes = torch.cat(inputs, 1), ([1, 1], [HALO, HALO], [1, 1], False, [0, 0], 1)
            d_images, d_weight, d_bias = torch.ops.aten.convolution_backward(
                gradient, images, weight, [len(weight)], *sizes, needs
            )
            d_inputs = d_inputs if d_images is None else d_images.split(channels, 1)
        else:
            if any(needs_inputs):
                d_inputs = _convolve([gradient], ctx.transposed(), None, channels)
            if needs_matrices:
                d_matrices = native.matrices_gradient(_channels_last(inputs), *_channels_last([gradient]))
            if needs_bias:
                d_bias = gradient.sum((0, 2, 3))
        return None, d_matrices, d_weight, d_bias, *d_inputs


def _convolve(inputs: Sequence[Tensor], matrices: Tensor, bias: Tensor | None, channels: Sequence[int]) -> list[Tensor]:
    """Images (N, I_k, H, W) to images (N, C, H, W) in channels-last memory, of so many channels each."""
    number, _, height, width = inputs[0].shape
    outputs = [torch.empty(number, count, height, width, memory_format=torch.channels_last) for count in channels]
    native.convolve(_channels_last(inputs), _channels_last(outputs), matrices, bias)
    return outputs


def _channels_last(images: Sequence[Tensor]) -> list[Tensor]:
    return [x.permute(0, 2, 3, 1) for x in images]

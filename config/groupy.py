"""Group convolutions over p4 (translations and quarter turns) and p4m (with mirrors), drop-in for GrouPy's layers.

Cohen and Welling, "Group Equivariant Convolutional Networks", ICML 2016; equations 2 and 3 of the S-DSEN paper.
A feature map on the group has shape (N, C, S, H, W): S = 4 orientations for p4, 8 for p4m. A group convolution is an
ordinary convolution with a bank of transformed copies of each filter: each transformation of the group acts on the
plane of the filter and permutes the filter's own orientation axis.
"""

import math

import torch
from torch import Tensor, nn

from fast.convolution import FilterLayer, conv2d


def _turn(weight: Tensor, r: int) -> Tensor:
    """Filters (O, I, S, k, k), S = 1, 4 or 8, turned by r quarter turns counter-clockwise, orientations included."""
    if weight.shape[2] > 1:
        weight = torch.cat([weight[:, :, :4].roll(r, 2), weight[:, :, 4:].roll(-r, 2)], 2)  # mirrored ones turn back
    return torch.rot90(weight, r, (-2, -1))


def _mirror(weight: Tensor) -> Tensor:
    """Filters (O, I, S, k, k) mirrored top to bottom; with S = 8, plain and mirrored orientations swap."""
    return weight.flip(-2).roll(4, 2) if weight.shape[2] == 8 else weight.flip(-2)


class GroupConv2d(FilterLayer, nn.Module):
    """Convolution from the plane or a group to a group; the four layers below set the orientations of both sides.

    Arguments as `nn.Conv2d`; `in_channels` and `out_channels` count regular channels, each of which has S orientations.
    Input (N, in_channels, in_orientations, H, W), without the orientation axis if its length is 1.
    Output (N, out_channels, out_orientations, H', W').
    State dict as GrouPy's: `weight (O, I, in_orientations, k, k)`, `bias (O)`, one bias for all orientations.
    Raises ValueError if the arguments or the input's rank, shape or device do not fit.
    """

    in_orientations: int
    out_orientations: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        bias: bool = True,
    ):
        super().__init__()
        height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        if height != width or height < 1:
            raise ValueError(f"a group convolution turns its filters, which must be square; got {kernel_size}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding = height, stride, padding
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, self.in_orientations, height, height))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as GrouPy does: uniform within 1 / sqrt(I k k), without the factor S of the fan-in."""
        bound = 1 / math.sqrt(self.in_channels * self.kernel_size**2)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def make_filters(self) -> tuple[Tensor, Tensor | None]:
        """The filter bank (O * S', I * S, k, k) and the bias (O * S') of the ordinary convolution."""
        bank = [_turn(self.weight, r) for r in range(4)]
        if self.out_orientations == 8:
            bank += [_mirror(filters) for filters in bank]
        # (O, S', I, S, k, k) -> (O * S', I * S, k, k)
        filters = torch.stack(bank, 1).flatten(0, 1).flatten(1, 2)
        return filters, None if self.bias is None else self.bias.repeat_interleave(self.out_orientations)

    def forward(self, *inputs: Tensor, constant: Tensor | None = None) -> Tensor:
        """Of one feature map, or of several side by side in the channels, as if concatenated.

        `constant` (C) are the values of the last C of `in_channels`, if these are the same in the whole image and in
        all orientations; only for 5x5 filters with stride 1 and padding 2.
        """
        planes = [self._planes(x) for x in inputs]
        known = self.in_channels * self.in_orientations
        if constant is not None:
            constant = constant.repeat_interleave(self.in_orientations)  # (C) -> (C * S)
            known -= len(constant)
        if sum(x.shape[1] for x in planes) != known:
            raise ValueError(f"{self._expects()}, got {', '.join(str(tuple(x.shape)) for x in inputs)}")
        y = conv2d(planes, self.filters(), self.stride, self.padding, constant)
        return y.unflatten(1, (self.out_channels, self.out_orientations))  # (N, O * S', H', W') -> (N, O, S', H', W')

    def _planes(self, x: Tensor) -> Tensor:
        """(N, I, S, H, W) -> (N, I * S, H, W); checks all but I."""
        if x.device != self.weight.device:
            raise ValueError(
                f"{type(self).__name__} has its weights on {self.weight.device}, but the input is on {x.device}"
            )
        if self.in_orientations == 1 and x.dim() == 4:
            return x
        if x.dim() != 5 or x.shape[2] != self.in_orientations:
            raise ValueError(f"{self._expects()}, got {tuple(x.shape)}")
        return x.flatten(1, 2)

    def _expects(self) -> str:
        shape = f"(N, {self.in_channels}, {self.in_orientations}, H, W)".replace(", 1,", ",")
        return f"{type(self).__name__} expects an input of shape {shape}"

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, bias={self.bias is not None}"
        )


class P4ConvZ2(GroupConv2d):
    """From the plane to p4 (equation 3): input (N, C, H, W), output (N, C', 4, H', W')."""

    in_orientations, out_orientations = 1, 4


class P4ConvP4(GroupConv2d):
    """From p4 to p4 (equation 2): input (N, C, 4, H, W), output (N, C', 4, H', W')."""

    in_orientations, out_orientations = 4, 4


class P4MConvZ2(GroupConv2d):
    """From the plane to p4m: input (N, C, H, W), output (N, C', 8, H', W')."""

    in_orientations, out_orientations = 1, 8


class P4MConvP4M(GroupConv2d):
    """From p4m to p4m: input (N, C, 8, H, W), output (N, C', 8, H', W')."""

    in_orientations, out_orientations = 8, 8

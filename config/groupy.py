"""Group convolutions over p4 (translations and quarter turns) and p4m (with mirrors), drop-in for GrouPy's layers.

Cohen and Welling, "Group Equivariant Convolutional Networks", ICML 2016; equations 2 and 3 of the S-DSEN paper.
A feature map on the group has shape (N, C, S, H, W): S = 4 orientations for p4, 8 for p4m. A group convolution is an
ordinary convolution with a bank of transformed copies of each filter: each transformation of the group acts on the
plane of the filter and permutes the filter's own orientation axis.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _turn(weight: Tensor, r: int) -> Tensor:
    """Filters (O, I, S, k, k), S = 1, 4 or 8, turned by r quarter turns counter-clockwise, orientations included."""
    if weight.shape[2] > 1:
        weight = torch.cat([weight[:, :, :4].roll(r, 2), weight[:, :, 4:].roll(-r, 2)], 2)  # mirrored ones turn back
    return torch.rot90(weight, r, (-2, -1))


def _mirror(weight: Tensor) -> Tensor:
    """Filters (O, I, S, k, k) mirrored top to bottom; with S = 8, plain and mirrored orientations swap."""
    return weight.flip(-2).roll(4, 2) if weight.shape[2] == 8 else weight.flip(-2)


class GroupConv2d(nn.Module):
    """Convolution from the plane or a group to a group; the four layers below set the orientations of both sides.

    Arguments as `nn.Conv2d`; `in_channels` and `out_channels` count regular channels, each of which has S orientations.
    State dict as GrouPy's: `weight (O, I, in_orientations, k, k)`, `bias (O)`, one bias for all orientations.
    Raises ValueError if the input's shape does not fit.
    """

    in_orientations: int
    out_orientations: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, self.in_orientations, *2 * [kernel_size]))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        bound = 1 / math.sqrt(in_channels * kernel_size**2)  # GrouPy's, without the factor S of the fan-in
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
        """Of feature maps (N, I_k, S, H, W), or (N, I_k, H, W), side by side in the channels: (N, O, S', H', W').

        `constant` (C) are the values of further channels behind them, each the same in the whole map.
        """
        planes = [self._planes(x) for x in inputs]
        known = self.in_channels * self.in_orientations
        if constant is not None:
            constant = constant.repeat_interleave(self.in_orientations)  # (C) -> (C * S)
            known -= len(constant)
        if sum(x.shape[1] for x in planes) != known:
            raise self._misfit(*inputs)
        y = self.convolve(planes, constant)
        return y.unflatten(1, (self.out_channels, self.out_orientations))  # (N, O * S', H', W') -> (N, O, S', H', W')

    def convolve(self, planes: Sequence[Tensor], constant: Tensor | None = None) -> Tensor:
        """The ordinary convolution of images (N, I_k, H, W) and constant channels (C): (N, O * S', H', W')."""
        if constant is not None:
            number, _, height, width = planes[0].shape
            planes = [*planes, constant.view(1, -1, 1, 1).expand(number, -1, height, width)]
        images = torch.cat(planes, 1) if len(planes) > 1 else planes[0]
        return F.conv2d(images, *self.make_filters(), self.stride, self.padding)

    def _planes(self, x: Tensor) -> Tensor:
        """(N, I, S, H, W) -> (N, I * S, H, W); checks all but I."""
        if self.in_orientations == 1 and x.dim() == 4:
            return x
        if x.dim() != 5 or x.shape[2] != self.in_orientations:
            raise self._misfit(x)
        return x.flatten(1, 2)

    def _misfit(self, *inputs: Tensor) -> ValueError:
        expected = f"(N, {self.in_channels}, {self.in_orientations}, H, W)".replace(", 1,", ",")
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        return ValueError(f"{type(self).__name__} expects an input of shape {expected}, got {shapes}")


class P4ConvZ2(GroupConv2d):
    in_orientations, out_orientations = 1, 4  # the plane to p4, equation 3: (N, C, H, W) -> (N, C', 4, H', W')


class P4ConvP4(GroupConv2d):
    in_orientations, out_orientations = 4, 4  # p4 to p4, equation 2: (N, C, 4, H, W) -> (N, C', 4, H', W')


class P4MConvZ2(GroupConv2d):
    in_orientations, out_orientations = 1, 8  # the plane to p4m: (N, C, H, W) -> (N, C', 8, H', W')


class P4MConvP4M(GroupConv2d):
    in_orientations, out_orientations = 8, 8  # p4m to p4m: (N, C, 8, H, W) -> (N, C', 8, H', W')

"""The coarse-to-fine network: stages that share their weights, joined by dense connections, and a refinement.

Sections and equations are those of the coarse-to-fine paper. Each stage predicts the whole rain layer of the rainy
image O_0: it restores O_t = O_0 - R_t (section III-A). Only the fusion of O_0, ..., O_{t-1} is each stage's own.

Within a stage the paper does not say where LeakyReLU stands: here it follows f_st, the dilated layers and the block's
fusion, while the other 1x1 layers and r_st are linear. Nor does it say what lies around an image: here zeros.
"""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from base.devices import without_autocast
from networks.base import Network

SLOPE = 0.2  # of every LeakyReLU, sections III-C and IV-A


def _convolution(in_channels: int, out_channels: int, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    """3x3, with zeros around the image, so that (N, C, H, W) keeps H and W."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=bias)


def _activation() -> nn.LeakyReLU:
    return nn.LeakyReLU(SLOPE, inplace=True)  # in place: what it is applied to need not be kept for the gradients


class DCDCB(nn.Module):
    """Densely connected dilation convolution block, (N, C, H, W) -> (N, C, H, W), section III-B.

    Where it is not `dense`, each layer gets the one before it alone, and the last layer is the block's output.
    """

    def __init__(self, channel: int, depth: int, dilated: bool, dense: bool):
        super().__init__()
        self.dense = dense
        self.joins, self.layers = nn.ModuleList(), nn.ModuleList()
        self.halo = 0
        for l in range(1, depth + 1):
            # A concatenation of one tensor, z_0, needs no fusion.
            is_join = dense and l > 1
            self.joins.append(nn.Conv2d(l * channel, channel, 1, bias=False) if is_join else nn.Identity())
            dilation = 2 ** (l - 1) if dilated else 1
            self.layers.append(nn.Sequential(_convolution(channel, channel, dilation), _activation()))
            self.halo += dilation
        self.fusion = nn.Identity()
        if dense:
            self.fusion = nn.Sequential(nn.Conv2d((depth + 1) * channel, channel, 1), _activation())

    def forward(self, X: Tensor) -> Tensor:
        joined = X  # Cat[z_{l-1}, ..., z_0] of equation 3, (N, l * C, H, W)
        for join, layer in zip(self.joins, self.layers, strict=True):
            z = layer(join(joined))
            joined = torch.cat([z, joined], 1) if self.dense else z
        return self.fusion(joined)  # equation 4


class Coarse2Fine(Network):
    """Coarse-to-fine network, with every variant of the paper's ablations.

    Args:
        channel: channels of every layer between an image and the next one (16).
        depth: dilated layers in the block of a stage (4).
        stage_num: stages (12), with the same weights but for the fusion of the images before each.
        dilated: dilate layer l by 2^(l-1); otherwise by 1 (No-dilation).
        inner_dense: dense connections within the block; otherwise a chain of its layers (No-inner-dense).
        outer_dense: fuse all images so far for a stage; otherwise it gets the last one alone (No-outer-dense).
        refined: refine the last stage's image; otherwise that is the result (No-refinement).
    """

    def __init__(
        self,
        channel: int = 16,
        depth: int = 4,
        stage_num: int = 12,
        dilated: bool = True,
        inner_dense: bool = True,
        outer_dense: bool = True,
        refined: bool = True,
    ):
        super().__init__()
        self.stage_num, self.outer_dense, self.refined = stage_num, outer_dense, refined
        self.output_num = stage_num + refined
        # The first stage has one image, and nothing to fuse.
        self.fusions = nn.ModuleList(
            nn.Conv2d(3 * t, 3, 1) if outer_dense and t > 1 else nn.Identity() for t in range(1, stage_num + 1)
        )
        block = DCDCB(channel, depth, dilated, inner_dense)
        self.stage = nn.Sequential(  # a fused image to its rain layer, equation 2; no activation behind r_st
            OrderedDict(
                f_st=nn.Sequential(_convolution(3, channel), _activation()),
                block=block,
                r_st=_convolution(channel, 3, bias=False),
            )
        )
        self.pixel_bytes = 24 * channel * (depth + 1)  # measured: up to 1430 of the published network
        self.halo = stage_num * (1 + block.halo + 1)  # pixels around one that its last output depends on
        if refined:
            self.refinement = nn.Sequential(  # equation 5, from image to image, not to a rain layer
                _convolution(3, channel),
                _activation(),
                _convolution(channel, channel),
                _activation(),
                nn.Conv2d(channel, 3, 1),
            )
            self.halo += 2

    def forward(self, O: Tensor, stage_num: int | None = None) -> list[Tensor]:
        """Rain layers of rainy images `O` (N, 3, H, W) in [0, 1], any H and W, each (N, 3, H, W).

        [R_1, ..., R_T], of which O - R_t is the image O_t restored by stage t, and, with `refined`, O - B^ of the
        refined image B^. `stage_num` stops after so many of these `output_num` rain layers.
        """
        if O.dim() != 4 or O.shape[1] != 3:
            raise ValueError(f"{type(self).__name__} expects rainy images of shape (N, 3, H, W), got {tuple(O.shape)}")
        output_num = self.output_num if stage_num is None else stage_num
        if not 1 <= output_num <= self.output_num:
            raise ValueError(f"{type(self).__name__} has outputs 1 to {self.output_num}, got stage_num {stage_num}")
        rain_layers, images = [], O  # Cat[O_{t-1}, ..., O_0] of equation 2, (N, 3 * t, H, W)
        block = self.checkpointed(self.stage.block)
        for fusion in self.fusions[:output_num]:
            with without_autocast(O):
                x = self.stage.f_st(fusion(images))
            x = block(x).to(O.dtype)
            with without_autocast(O):
                R = self.stage.r_st(x)
            rain_layers.append(R)
            images = torch.cat([O - R, images], 1) if self.outer_dense else O - R
        if output_num > len(rain_layers):
            with without_autocast(O):
                rain_layers.append(O - self.refinement(O - R))
        return rain_layers

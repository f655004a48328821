"""The parallel and hierarchical context pyramids (PHP), their ablations, and the segmentation network beside them.

They are of "Intensity-Aware Single-Image Deraining with Semantic and Color Regularization", whose sections, figures and
equations the comments name. Its letters are Y for the rainy image (here O), X^c for the image that sub-network 1
restores, and X for that of sub-network 2, which adds the details.

The paper trains from scratch and says no more of the initial weights than that they are random. Here they are LeCun
normal with zero biases, as SELU needs to keep activations at mean 0 and variance 1. The top-down sums and the residuals
add to that and the reweighting takes from it, but nothing vanishes or explodes: with images of noise in [0, 1], the
mean square is 0.4 behind the stem, 0.3, 0.6, 1.1 and 1.8 behind levels 1 to 4, and 1.2 and 2.1 in the rain layers (each
the mean of 100 seeds).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.base import Network

CHANNELS = 48  # of the stem and of every level
LEVELS = BRANCHES = 4  # levels h, and parallel convolutions i in each: k of figure 3
HIDDEN = 16  # channels at full resolution, in front of the outputs
CLASSES = 19  # of Cityscapes, section III-D
STRIDE = 2  # of the stem: the levels work at half the resolution

# The dilations of the convolutions in level h, which share its channels: all blocks have equally many weights. Behind
# "php" they are summed top-down and reweighted; in the others, the first rows of table IV, they are concatenated alone.
DILATIONS = {
    "php": lambda h: [h * i for i in range(1, BRANCHES + 1)],
    "concatenation": lambda h: [h * i for i in range(1, BRANCHES + 1)],  # PHP-concatenation
    "parallel": lambda h: list(range(1, BRANCHES + 1)),  # Parallel Only: level 1's pyramid in each
    "hierarchical": lambda h: [h],  # Hierarchical Only: one convolution with all channels
    "standard": lambda h: [1],  # Standard Convolution
}


def _convolution(in_channels: int, out_channels: int, kernel: int = 3, dilation: int = 1, **options) -> nn.Conv2d:
    """A convolution with zeros around the image, so that (N, C, H, W) keeps H and W, and LeCun normal weights."""
    padding = dilation * (kernel // 2)
    layer = nn.Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=dilation, **options)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")  # variance 1 / fan-in: LeCun's
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _activation() -> nn.SELU:
    return nn.SELU(inplace=True)  # in place: what it is applied to need not be kept for the gradients


def _check_images(network: nn.Module, images: Tensor, kind: str) -> None:
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(
            f"{type(network).__name__} expects {kind} images of shape (N, 3, H, W), got {tuple(images.shape)}"
        )


class ContrastAwarePooling(nn.Module):
    """Rainy images (N, 3, H, W) to their pixels of low contrast, pooled, (N, 3, H / 2, W / 2); section III-B."""

    def __init__(self):
        super().__init__()
        self.f_d1 = _convolution(3, 1, kernel=1)
        self.f_d2 = _convolution(3, 1, dilation=2)

    def forward(self, Y: Tensor) -> Tensor:
        C_a = torch.sigmoid(self.f_d1(Y) - self.f_d2(Y))  # equation 2, (N, 1, H, W)
        return F.avg_pool2d((1 - C_a) * Y, STRIDE)


POOLINGS = {"contrast": ContrastAwarePooling, "max": partial(nn.MaxPool2d, STRIDE), "none": lambda: None}


class Level(nn.Module):
    """One parallel pyramid, (N, `in_channels`, H, W) -> (N, 48, H, W), figure 3.

    Args:
        dilations: of the parallel convolutions, which share the 48 channels equally, from small to large.
        aggregated: sum top-down and reweight what the convolutions find; otherwise it is concatenated alone.
        residual: add the input.
    """

    def __init__(self, in_channels: int, dilations: list[int], aggregated: bool, residual: bool):
        super().__init__()
        self.aggregated, self.residual = aggregated, residual
        branch_channels = CHANNELS // len(dilations)
        self.branches = nn.ModuleList(
            nn.Sequential(_convolution(in_channels, branch_channels, dilation=dilation), _activation())
            for dilation in dilations
        )
        self.halo = max(dilations)  # pixels to each side of one that it depends on
        if aggregated:
            depthwise = partial(_convolution, CHANNELS, CHANNELS, groups=CHANNELS)
            self.T = nn.Sequential(depthwise(), _activation(), depthwise(), _activation())
            self.halo += 2

    def forward(self, x: Tensor) -> Tensor:
        p = [branch(x) for branch in self.branches]
        if self.aggregated:
            for i in range(1, len(p)):
                p[i] = p[i] + p[i - 1]  # smaller receptive fields into larger ones
        f = torch.cat(p, 1)  # (N, 48, H, W)
        if self.aggregated:
            f = f * torch.sigmoid(self.T(f))
        return x + f if self.residual else f


class NonLocal(nn.Module):
    """Non-local block in the place of a level, (N, C, H, W) -> (N, C, H, W).

    It is the embedded Gaussian form of "Non-local neural networks" (Wang et al., CVPR 2018) with that paper's residual,
    and without its normalisation, which this network has nowhere.
    """

    halo = None  # a pixel depends on all of them

    def __init__(self, channels: int):
        super().__init__()
        self.theta = _convolution(channels, CHANNELS // 2, kernel=1)
        # A bias here would add the same to all scores of a pixel, which the softmax takes away again.
        self.phi = _convolution(channels, CHANNELS // 2, kernel=1, bias=False)
        self.g = _convolution(channels, CHANNELS // 2, kernel=1)
        self.W = _convolution(CHANNELS // 2, channels, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        # (N, 24, H, W) -> (N, 1, H * W, 24): one head. Contiguous, or PyTorch would hold all (H * W)^2 scores at once.
        query, key, value = (
            f(x).flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for f in (self.theta, self.phi, self.g)
        )
        y = F.scaled_dot_product_attention(query, key, value, scale=1.0)  # softmax(theta^T phi) g
        return x + self.W(y.squeeze(1).transpose(1, 2).unflatten(2, x.shape[-2:]))  # -> (N, 24, H, W) -> x's shape


class PyramidNetwork(nn.Module):
    """Sub-network 1, (N, 3, H, W) -> (N, `out_channels`, H, W), any H and W; figure 2. Arguments as those of `PHP`."""

    def __init__(self, out_channels: int, block: str = "php", pooling: str = "contrast"):
        super().__init__()
        self.stem = nn.Sequential(_convolution(3, CHANNELS, stride=STRIDE), _activation())
        self.pooling = POOLINGS[pooling]()
        in_channels = CHANNELS if self.pooling is None else CHANNELS + 3
        if block == "non_local":
            levels, channels = [NonLocal(in_channels) for _ in range(LEVELS)], in_channels
        else:
            levels, channels = [], CHANNELS
            for h in range(1, LEVELS + 1):  # level 1 has no residual: its input has other channels
                first = h == 1
                dilations = DILATIONS[block](h)
                levels.append(Level(in_channels if first else CHANNELS, dilations, block == "php", not first))
        self.levels = nn.Sequential(*levels)
        self.head = nn.Sequential(
            nn.Upsample(scale_factor=STRIDE, mode="bilinear"),
            *(_convolution(channels, HIDDEN), _activation()),
            _convolution(HIDDEN, out_channels, kernel=1),
        )
        self.halo = None  # pixels to each side of one that its output depends on
        if block != "non_local":
            # The head's 3x3 and bilinear upsampling reach 1 pixel each; the stem 1, and 1 from an odd pixel to the even
            # one that it is centred at; pooling 2 by f_d2's dilation, and 1 to the second pixel of a pair.
            self.halo = 2 + STRIDE * sum(level.halo for level in levels) + (3 if pooling == "contrast" else 2)

    def forward(self, Y: Tensor) -> Tensor:
        height, width = Y.shape[-2:]
        Y = F.pad(Y, (0, width % STRIDE, 0, height % STRIDE), mode="replicate")
        features = self.stem(Y)  # (N, 48, H / 2, W / 2)
        if self.pooling is not None:
            features = torch.cat([features, self.pooling(Y)], 1)  # (N, 51, H / 2, W / 2)
        return self.head(self.levels(features))[..., :height, :width]


class PHP(Network):
    """Intensity-aware deraining network, with every variant of table IV that is a network of this paper.

    Args:
        block: "php", or what the other rows have in its place: "concatenation" (no top-down sums, no reweighting),
            "parallel" (and dilations 1 to 4 in every level), "hierarchical" (dilation h in level h), "standard" (no
            dilation), or "non_local" blocks.
        pooling: of the rainy image, for the levels: "contrast" (contrast-aware), "max" or "none".
        refined: have sub-network 2, for the details; otherwise X^c is the result (w/o. X).
    """

    stride = STRIDE
    pixel_bytes = 800  # measured: 500 to 770

    def __init__(self, block: str = "php", pooling: str = "contrast", refined: bool = True):
        super().__init__()
        self.output_num = 1 + refined
        self.pyramids = PyramidNetwork(3, block, pooling)
        self.halo = self.pyramids.halo  # pixels to each side of one that the last output depends on; None: all
        if refined:  # sub-network 2, at full resolution
            in_channels = [3, HIDDEN, HIDDEN, HIDDEN]
            layers = [layer for n in in_channels for layer in (_convolution(n, HIDDEN), _activation())]
            self.refinement = nn.Sequential(*layers, _convolution(HIDDEN, 3, kernel=1))
            if self.halo is not None:
                self.halo += len(in_channels)

    def forward(self, O: Tensor, stage_num: int | None = None) -> list[Tensor]:
        """Rain layers [O - X^c, O - X] of rainy images `O` (N, 3, H, W) in [0, 1], any H and W, each (N, 3, H, W).

        `stage_num` stops after so many of these `output_num` rain layers.
        """
        _check_images(self, O, "rainy")
        output_num = self.output_num if stage_num is None else stage_num
        if output_num not in range(1, self.output_num + 1):
            raise ValueError(f"{type(self).__name__} has outputs 1 to {self.output_num}, got stage_num {stage_num}")
        R = self.checkpointed(self.pyramids)(O).to(O.dtype)  # X^c = Y - R; autocast may have made it bfloat16
        rain_layers = [R]
        if output_num > 1:
            rain_layers.append(R - self.refinement(O - R))  # X = X^c + the details
        return rain_layers


class Segmentation(nn.Module):
    """Phi of section III-C: images (N, 3, H, W), any H and W, to logits of the classes (N, 19, H, W).

    It has the shape of sub-network 1 (section III-D), and weights of its own.
    """

    def __init__(self, classes: int = CLASSES):
        super().__init__()
        self.pyramids = PyramidNetwork(classes)

    def forward(self, X: Tensor) -> Tensor:
        _check_images(self, X, "restored")
        return self.pyramids(X)

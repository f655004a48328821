"""The intensity-aware network (PHP: parallel and hierarchical pyramids), its ablations, its loss and its labels.

Sections, figures and equations are those of "Intensity-Aware Single-Image Deraining with Semantic and Color
Regularization". Y is the rainy image (here O), X^c the image restored by sub-network 1, X that of sub-network 2, which
adds details. Initial weights, random in the paper, are LeCun normal with zero biases here, as SELU needs.
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.devices import without_autocast
from base.errors import Mismatch
from base.images import read_image
from base.options import option
from networks.base import Network, Terms, by_stage, charbonnier

CHANNELS = 48  # of the stem and of each level
LEVELS = BRANCHES = 4  # levels h, and parallel convolutions i in each: k of figure 3
HIDDEN = 16  # channels at full resolution, before the outputs
CLASSES = 19  # of Cityscapes, section III-D
STRIDE = 2  # of the stem: the levels work at half the resolution
LABELS = "label"  # folder beside the images with a PNG of labels for each, of the same name
IGNORED = 255  # label of pixels without a class
EPSILON = 1e-6  # of the loss: Charbonnier's
LOWPASS = 9  # side of the Gaussian window, pixels

# Dilations of the parallel convolutions of level h. They share its channels, so that all blocks have as many weights.
# "php" also sums them top-down and reweights them; the others are rows of table IV.
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


_activation = partial(nn.SELU, inplace=True)  # in place: the gradients do not need its input


class ContrastAwarePooling(nn.Module):
    """Pool the low-contrast pixels of rainy images, (N, 3, H, W) -> (N, 3, H / 2, W / 2), section III-B."""

    def __init__(self):
        super().__init__()
        self.f_d1 = _convolution(3, 1, kernel=1)
        self.f_d2 = _convolution(3, 1, dilation=2)

    def forward(self, Y: Tensor) -> Tensor:
        C_a = torch.sigmoid(self.f_d1(Y) - self.f_d2(Y))  # equation 2, (N, 1, H, W)
        return F.avg_pool2d((1 - C_a) * Y, STRIDE)


POOLINGS = {"contrast": ContrastAwarePooling, "max": partial(nn.MaxPool2d, STRIDE), "none": lambda: None}

_network = partial(option, group="Model php", usual=False)
_loss = partial(option, group="Loss php", usual=False, minimum=0)


@dataclass(frozen=True)
class PHPSettings:
    """The settings of this network and its loss; `settings.Settings` inherits them. `refined` is in coarse2fine too."""

    block: str = _network("php", "block of a pyramid level", choices=(*DILATIONS, "non_local"))
    pooling: str = _network("contrast", "pooling of the rainy image for the levels", choices=tuple(POOLINGS))
    lowpass_sigma: float = _loss(1.7, "sigma of the low-pass filter of X^c's ground truth, pixels; 0: off")
    colour_weight: float = _loss(0.1, "weight of the colour term")
    segmentation_weight: float = _loss(0.05, "weight of the segmentation term, if there are labels")


class Level(nn.Module):
    """One parallel pyramid, (N, `in_channels`, H, W) -> (N, 48, H, W), figure 3; `dilations` from small to large.

    `aggregated`: sum the outputs top-down and reweight them, else concatenate them. `residual`: add the input.
    """

    def __init__(self, in_channels: int, dilations: list[int], aggregated: bool, residual: bool):
        super().__init__()
        self.aggregated, self.residual = aggregated, residual
        branch_channels = CHANNELS // len(dilations)
        convolutions = (_convolution(in_channels, branch_channels, dilation=dilation) for dilation in dilations)
        self.branches = nn.ModuleList(nn.Sequential(convolution, _activation()) for convolution in convolutions)
        self.halo = max(dilations)  # receptive field, pixels to each side
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
    """Non-local block (N, C, H, W) in place of a level: Wang et al., CVPR 2018, embedded Gaussian, not normalised."""

    halo = None  # the whole image

    def __init__(self, channels: int):
        super().__init__()
        self.theta = _convolution(channels, CHANNELS // 2, kernel=1)
        self.phi = _convolution(channels, CHANNELS // 2, kernel=1, bias=False)  # a bias would not change the softmax
        self.g = _convolution(channels, CHANNELS // 2, kernel=1)
        self.W = _convolution(CHANNELS // 2, channels, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        # (N, 24, H, W) -> (N, 1, H * W, 24): one head; contiguous, so that PyTorch does not store all (H * W)^2 scores.
        features = (f(x).flatten(2).transpose(1, 2) for f in (self.theta, self.phi, self.g))
        query, key, value = (f.unsqueeze(1).contiguous() for f in features)
        y = F.scaled_dot_product_attention(query, key, value, scale=1.0)  # softmax(theta^T phi) g
        return x + self.W(y.squeeze(1).transpose(1, 2).unflatten(2, x.shape[-2:]))  # -> (N, 24, H, W) -> x's shape


class PyramidNetwork(nn.Module):
    """Sub-network 1, (N, 3, H, W) -> (N, `out_channels`, H, W), any H and W, figure 2; arguments as for `PHP`."""

    def __init__(self, out_channels: int, block: str = "php", pooling: str = "contrast"):
        super().__init__()
        self.stem = nn.Sequential(_convolution(3, CHANNELS, stride=STRIDE), _activation())
        self.pooling = POOLINGS[pooling]()
        in_channels = CHANNELS if self.pooling is None else CHANNELS + 3
        if block == "non_local":
            levels, channels = [NonLocal(in_channels) for _ in range(LEVELS)], in_channels
        else:
            # Level 1 has no residual: its input has more channels.
            dilations, channels = [DILATIONS[block](h) for h in range(1, LEVELS + 1)], CHANNELS
            levels = [Level(in_channels, dilations[0], block == "php", residual=False)]
            levels += [Level(CHANNELS, each, block == "php", residual=True) for each in dilations[1:]]
        self.levels = nn.Sequential(*levels)
        head = [_convolution(channels, HIDDEN), _activation(), _convolution(HIDDEN, out_channels, kernel=1)]
        self.head = nn.Sequential(nn.Upsample(scale_factor=STRIDE, mode="bilinear"), *head)
        self.halo = None  # receptive field, pixels to each side; None: the whole image
        if block != "non_local":
            # At full resolution: the head's 3x3 and the bilinear upsampling, 1 each; the stem 2 (1, and 1 from an odd
            # pixel to the even one it is centred at); contrast pooling 3 (2 for f_d2, 1 for the pair).
            self.halo = 2 + STRIDE * sum(level.halo for level in levels) + (3 if pooling == "contrast" else 2)

    def forward(self, Y: Tensor) -> Tensor:
        height, width = Y.shape[-2:]
        Y = F.pad(Y, (0, width % STRIDE, 0, height % STRIDE), mode="replicate")
        features = self.stem(Y)  # (N, 48, H / 2, W / 2)
        if self.pooling is not None:
            features = torch.cat([features, self.pooling(Y)], 1)  # (N, 51, H / 2, W / 2)
        return self.head(self.levels(features))[..., :height, :width]


class PHP(Network):
    """Intensity-aware deraining network, and its variants in table IV; the arguments are explained in `PHPSettings`."""

    stride = STRIDE
    pixel_bytes = 800  # measured: 500 to 770

    def __init__(self, block: str = "php", pooling: str = "contrast", refined: bool = True):
        super().__init__()
        self.output_num = 1 + refined
        self.pyramids = PyramidNetwork(3, block, pooling)
        self.halo = self.pyramids.halo
        if refined:  # sub-network 2, at full resolution
            in_channels = [3, HIDDEN, HIDDEN, HIDDEN]
            layers = [layer for n in in_channels for layer in (_convolution(n, HIDDEN), _activation())]
            self.refinement = nn.Sequential(*layers, _convolution(HIDDEN, 3, kernel=1))
            if self.halo is not None:
                self.halo += len(in_channels)

    def forward(self, O: Tensor, stage_num: int | None = None) -> list[Tensor]:
        """The first `stage_num` rain layers of [O - X^c, O - X], each (N, 3, H, W), of `O` (N, 3, H, W) in [0, 1]."""
        output_num = self.output_num if stage_num is None else stage_num
        self.check(O, output_num)
        R = self.checkpointed(self.pyramids)(O).to(O.dtype)  # X^c = Y - R; autocast may have made it bfloat16
        rain_layers = [R]
        if output_num > 1:
            rain_layers.append(R - self.refinement(O - R))  # X = X^c + the details
        return rain_layers


class PHPLoss(nn.Module):
    """Accuracy, colour and segmentation terms, section III-C, equations 3 to 5.

    Charbonnier of X^c against the low-passed ground truth and of X against the ground truth; 1 - cosine of the colours;
    if `labelled`, cross entropy of the classes that a network, trained along, predicts from X^c.
    """

    def __init__(self, refined: bool, sigma: float, colour_weight: float, segmentation_weight: float, labelled: bool):
        super().__init__()
        self.refined, self.sigma = refined, sigma
        self.colour_weight, self.segmentation_weight = colour_weight, segmentation_weight
        # Phi: images (N, 3, H, W) to logits (N, 19, H, W); sub-network 1 (section III-D) with its own weights.
        self.segmentation = nn.Sequential(OrderedDict(pyramids=PyramidNetwork(CLASSES))) if labelled else None

    def forward(self, rain_layers: list[Tensor], O: Tensor, B: Tensor, labels: Tensor | None = None) -> Terms:
        """`labels` (N, H, W) int64 are the classes of the pixels, or IGNORED."""
        coarse = O - rain_layers[0]
        # Without sub-network 2, sub-network 1 has to restore the details as well.
        losses = [charbonnier(coarse - (lowpass(B, self.sigma) if self.refined else B), EPSILON)]
        losses += [charbonnier(O - R - B, EPSILON) for R in rain_layers[1:]]
        terms, loss = {}, torch.stack(losses).sum()
        if self.colour_weight:
            terms["colour"] = colour_loss(coarse, B)
            loss = loss + self.colour_weight * terms["colour"]
        if self.segmentation and labels is not None:
            logits = self.segmentation(coarse).float()
            # Not the mean of cross_entropy: it is nan where all pixels are ignored.
            total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            terms["segmentation"] = total / (labels != IGNORED).sum().clamp(min=1)
            loss = loss + self.segmentation_weight * terms["segmentation"]
        return {"loss": loss, **by_stage(losses), **terms}


def lowpass(images: Tensor, sigma: float) -> Tensor:
    """Gaussian filter of images (N, C, H, W), 9x9 with replicated borders; sigma 0 returns them unchanged."""
    if not sigma:
        return images
    offsets = torch.arange(LOWPASS, device=images.device, dtype=images.dtype) - LOWPASS // 2
    window = torch.exp(-offsets.square() / (2 * sigma**2))
    window = (window / window.sum()).expand(images.shape[1], 1, 1, -1)
    images = F.pad(images, [LOWPASS // 2] * 4, mode="replicate")
    with without_autocast(images):
        images = F.conv2d(images, window, groups=images.shape[1])
        return F.conv2d(images, window.transpose(2, 3), groups=images.shape[1])


def colour_loss(restored: Tensor, B: Tensor) -> Tensor:
    """1 - mean cosine of the pixels' colours in images (N, 3, H, W); black pixels of `B` count as equal."""
    cosine = F.cosine_similarity(restored, B, dim=1, eps=1e-6)
    return 1 - torch.where(B.square().sum(1) > 0, cosine, 1.0).mean()


def read_labels(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The classes (H, W) uint8 from the PNG of labels of an image of `shape` (H, W); all IGNORED if there is none."""
    file = path.parent / LABELS / f"{path.stem}.png"
    if not file.is_file():
        return np.full(shape, IGNORED, np.uint8)
    labels = read_image(file)
    known = labels.dtype == np.uint8 and ((labels < CLASSES) | (labels == IGNORED)).all()
    if labels.shape != shape or not known:
        size = f"{shape[1]}x{shape[0]} pixels, as its image is"
        raise Mismatch(f"{file} must be a grey 8-bit image of {size}, with labels 0 to {CLASSES - 1} or {IGNORED}")
    return labels

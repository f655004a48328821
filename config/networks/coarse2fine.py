"""The coarse-to-fine network: stages that share their weights, joined by dense connections, and a refinement.

Sections and equations are those of the coarse-to-fine paper. Each stage predicts the whole rain layer of the rainy
image O_0 and restores O_t = O_0 - R_t (section III-A). Only the fusion of O_0, ..., O_{t-1} differs between stages.

The paper does not say where LeakyReLU is applied (here after f_st, the dilated layers and the block's fusion; the other
1x1 layers and r_st are linear), nor how images are padded (here with zeros).
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.console import log
from base.devices import without_autocast
from base.errors import DamagedFile, MissingFile
from base.options import option
from networks.base import Network, Terms, by_stage

SLOPE = 0.2  # of every LeakyReLU, sections III-C and IV-A
VGG_CHANNELS = (64, 64, 0, 128, 128, 0, 256, 256, 256)  # of VGG-16's convolutions to relu3_3; 0: max pooling
VGG_FILE = "vgg16-397923af.pth"  # torchvision's name for the weights
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of VGG's input, RGB

_network = partial(option, group="Model coarse2fine", usual=False)
_loss = partial(option, group="Loss coarse2fine", usual=False, path=True)


@dataclass(frozen=True)
class Coarse2FineSettings:
    """The settings of this network and its loss; `settings.Settings` inherits them."""

    dilated: bool = _network(True, "dilate layer l of a stage by 2^(l-1)")
    inner_dense: bool = _network(True, "dense connections within a stage")
    outer_dense: bool = _network(True, "a stage gets the images of all stages before it")
    refined: bool = _network(True, "refine the last image; php: add details with sub-network 2")
    vgg_weights: str = _loss("", "file of torchvision's VGG-16; empty: from torchvision's cache, if it is there")


def _convolution(in_channels: int, out_channels: int, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    """3x3, with zeros around the image, so that (N, C, H, W) keeps H and W."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=bias)


_activation = partial(nn.LeakyReLU, SLOPE, inplace=True)  # in place: the gradients do not need its input


class DCDCB(nn.Module):
    """Densely connected dilation convolution block (N, C, H, W), section III-B; not `dense`: a chain of its layers."""

    def __init__(self, channel: int, depth: int, dilated: bool, dense: bool):
        super().__init__()
        self.dense = dense
        self.joins, self.layers = nn.ModuleList(), nn.ModuleList()
        dilations = [2**l if dilated else 1 for l in range(depth)]
        self.halo = sum(dilations)
        for l, dilation in enumerate(dilations, 1):
            is_join = dense and l > 1  # a concatenation of one tensor, z_0, needs no fusion
            self.joins.append(nn.Conv2d(l * channel, channel, 1, bias=False) if is_join else nn.Identity())
            self.layers.append(nn.Sequential(_convolution(channel, channel, dilation), _activation()))
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
    """Coarse-to-fine network: `stage_num` stages with `depth` dilated layers of `channel` channels.

    The flags are the paper's ablations, see `Coarse2FineSettings`. Stages share all weights but those of their fusions.
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
        # Stage 1 has one image and nothing to fuse.
        self.fusions = nn.ModuleList(
            nn.Conv2d(3 * t, 3, 1) if outer_dense and t > 1 else nn.Identity() for t in range(1, stage_num + 1)
        )
        block = DCDCB(channel, depth, dilated, inner_dense)
        f_st = nn.Sequential(_convolution(3, channel), _activation())
        r_st = _convolution(channel, 3, bias=False)
        # A fused image to its rain layer, equation 2; r_st is linear.
        self.stage = nn.Sequential(OrderedDict(f_st=f_st, block=block, r_st=r_st))
        self.pixel_bytes = 24 * channel * (depth + 1)  # measured: up to 1430 of the published network
        self.halo = stage_num * (1 + block.halo + 1)  # receptive field of the last output, pixels to each side
        if refined:
            layers = [_convolution(3, channel), _activation(), _convolution(channel, channel), _activation()]
            self.refinement = nn.Sequential(*layers, nn.Conv2d(channel, 3, 1))  # equation 5, image to image
            self.halo += 2

    def forward(self, O: Tensor, stage_num: int | None = None) -> list[Tensor]:
        """Rain layers [R_1, ..., R_T], and O - B^ if `refined`, of `O` (N, 3, H, W) in [0, 1]; `stage_num` of them."""
        output_num = self.output_num if stage_num is None else stage_num
        self.check(O, output_num)
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


class Coarse2FineLoss(nn.Module):
    """Mean squared error of each stage's rain layer; L1 and, with VGG-16, VGG loss of the refined image (III-D)."""

    def __init__(self, refined: bool, vgg_weights: str):
        super().__init__()
        self.refined = refined
        self.features = vgg_features(vgg_weights) if refined else None
        # Buffers, because a CUDA graph can't contain a copy from Python to the GPU.
        for name, values in zip(("mean", "deviation"), IMAGENET, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, rain_layers: list[Tensor], O: Tensor, B: Tensor, labels: Tensor | None = None) -> Terms:
        losses = [F.mse_loss(R, O - B) for R in rain_layers]
        terms = {}
        if self.refined:
            image = O - rain_layers[-1]
            terms["l1"] = F.l1_loss(image, B)
            if self.features:
                terms["vgg"] = F.l1_loss(self._features(image), self._features(B))
            losses[-1] = torch.stack([*terms.values()]).sum()
        return {"loss": torch.stack(losses).sum(), **by_stage(losses), **terms}

    def _features(self, images: Tensor) -> Tensor:
        """BGR images (N, 3, H, W) in [0, 1] to VGG's features (N, 256, H / 4, W / 4)."""
        return self.features((images.flip(1) - self.mean) / self.deviation)


def vgg_features(weights: str) -> nn.Module | None:
    """VGG-16 up to relu3_3, frozen, from a file, or "" for torchvision's cache; None, logged, if that has none.

    Raises MissingFile, and DamagedFile if it is another kind of file.
    """
    path = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE
    if not path.is_file():
        if weights:
            raise MissingFile(f"{path} does not exist: vgg_weights is a file of torchvision's VGG-16")
        log.info(f"{path} does not exist: training without the VGG term of the loss (--vgg_weights FILE)")
        return None
    layers, inputs = [], 3
    with torch.device("meta"):  # without drawing random weights
        for channels in VGG_CHANNELS:
            convolution = [nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU(inplace=True)] if channels else []
            layers += convolution or [nn.MaxPool2d(2)]
            inputs = channels or inputs
    features = nn.Sequential(*layers)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        features.load_state_dict({name: state[f"features.{name}"] for name in features.state_dict()}, assign=True)
    except Exception as error:  # torch.load raises many kinds
        raise DamagedFile(f"{path} is not a file of torchvision's VGG-16 ({type(error).__name__})") from None
    return features.requires_grad_(False).eval()

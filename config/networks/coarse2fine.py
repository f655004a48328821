"""The coarse-to-fine network: stages that share their weights, joined by dense connections, and a refinement.

Sections and equations are those of the coarse-to-fine paper. Each stage predicts the whole rain layer of the rainy
image O_0 and restores O_t = O_0 - R_t (section III-A). Only the fusion of O_0, ..., O_{t-1} differs between stages.

The paper does not say where LeakyReLU is applied within a stage: here after f_st, the dilated layers and the block's
fusion; the other 1x1 layers and r_st are linear. Nor does it name the padding of images: here zeros.
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
from networks.base import Network
from networks.terms import Terms, by_stage

SLOPE = 0.2  # of every LeakyReLU, sections III-C and IV-A
VGG_CHANNELS = (64, 64, 0, 128, 128, 0, 256, 256, 256)  # of VGG-16's convolutions to relu3_3; 0: max pooling
VGG_FILE = "vgg16-397923af.pth"  # torchvision's name for the weights
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of VGG's input, RGB

_network = partial(option, group="Network coarse2fine", usual=False)


@dataclass(frozen=True)
class Coarse2FineSettings:
    """The settings of this network and its loss; `settings.Settings` inherits them."""

    dilated: bool = _network(True, "dilate layer l of a stage by 2^(l-1)")
    inner_dense: bool = _network(True, "dense connections within a stage")
    outer_dense: bool = _network(True, "a stage gets the images of all stages before it")
    refined: bool = _network(True, "refine the last image; php: add details with sub-network 2")
    vgg_weights: str = option(
        "",
        "file of torchvision's VGG-16; empty: from torchvision's cache, if it is there",
        group="Loss coarse2fine",
        path=True,
        usual=False,
    )


def _convolution(in_channels: int, out_channels: int, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    """3x3, with zeros around the image, so that (N, C, H, W) keeps H and W."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=bias)


def _activation() -> nn.LeakyReLU:
    return nn.LeakyReLU(SLOPE, inplace=True)  # in place: the gradients do not need its input


class DCDCB(nn.Module):
    """Densely connected dilation convolution block, (N, C, H, W) -> (N, C, H, W), section III-B.

    If not `dense`, each layer gets the output of the one before, and the block returns that of the last.
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
        channel: channels of the layers within a stage (16).
        depth: dilated layers in the block of a stage (4).
        stage_num: stages (12), which share all weights except those that fuse the earlier images.
        dilated: dilate layer l by 2^(l-1); otherwise by 1 (No-dilation).
        inner_dense: dense connections within the block; otherwise a chain of its layers (No-inner-dense).
        outer_dense: a stage gets all images so far, fused; otherwise the last one (No-outer-dense).
        refined: refine the last stage's image; otherwise it is the result (No-refinement).
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
        self.stage = nn.Sequential(  # a fused image to its rain layer, equation 2; r_st is linear
            OrderedDict(
                f_st=nn.Sequential(_convolution(3, channel), _activation()),
                block=block,
                r_st=_convolution(channel, 3, bias=False),
            )
        )
        self.pixel_bytes = 24 * channel * (depth + 1)  # measured: up to 1430 of the published network
        self.halo = stage_num * (1 + block.halo + 1)  # receptive field of the last output, pixels to each side
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
        """Rain layers, each (N, 3, H, W), of rainy images `O` (N, 3, H, W) in [0, 1], any H and W.

        These are [R_1, ..., R_T], where O - R_t is the image O_t restored by stage t, and, if `refined`, O - B^ for the
        refined image B^. `stage_num` returns only so many of the `output_num` rain layers.
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


class Coarse2FineLoss(nn.Module):
    """Mean squared error of each stage's rain layer, L1 and VGG loss of the refined image (section III-D).

    All weights are 1. Without the weights of VGG-16 there is no VGG term.
    """

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
    """VGG-16 up to relu3_3 with frozen weights, or None, logged, if torchvision's cache has no weights.

    `weights` is a file of torchvision's VGG-16, or empty for the one in the cache. Raises MissingFile, and DamagedFile
    if it is another kind of file.
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
            if channels:
                layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU(inplace=True)]
                inputs = channels
            else:
                layers.append(nn.MaxPool2d(2))
    features = nn.Sequential(*layers)
    prefix = "features."
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        features.load_state_dict({name: state[name] for name in features.state_dict()}, assign=True)
    except Exception as error:  # torch.load raises many kinds
        raise DamagedFile(f"{path} is not a file of torchvision's VGG-16 ({type(error).__name__})") from None
    return features.requires_grad_(False).eval()

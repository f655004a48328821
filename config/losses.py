"""Losses: of the stages one by one, and those of the two networks whose papers give a loss of several terms.

A loss is a module from the rain layers of all stages to a dict of named terms. `loss` is what is trained on, and
`stage_t/loss` the part of stage t; a loss with parts of its own beside adds them by their names.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cal_ssim
from base.console import log
from base.devices import without_autocast
from base.errors import UserError
from networks.php import Segmentation
from settings import Settings

CHARBONNIER = 1e-3  # below this difference the loss is square, above it absolute
FINE_CHARBONNIER = 1e-6  # the same in "php"
LOWPASS = 9  # side of the Gaussian window, pixels
IGNORED = 255  # label of the pixels that have none
VGG_CHANNELS = (64, 64, 0, 128, 128, 0, 256, 256, 256)  # of VGG-16's convolutions to relu3_3; 0: max pooling
VGG_FILE = "vgg16-397923af.pth"  # torchvision's name for its weights
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # means and deviations that VGG's input is normalised by, RGB

Terms = dict[str, Tensor]


def charbonnier(difference: Tensor, epsilon: float = CHARBONNIER) -> Tensor:
    return (difference.square() + epsilon**2).sqrt().mean()


STAGE_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # of (R, O, B), the mean over the batch
    # As mse_loss, whose gradient would not be channels-last, nor a mean's.
    "mse": lambda R, O, B: (R - (O - B)).square().sum() / R.numel(),
    "l1": lambda R, O, B: F.l1_loss(R, O - B),
    "charbonnier": lambda R, O, B: charbonnier(R - O + B),
    "ssim": lambda R, O, B: 1 - cal_ssim.ssim(O - R, B).mean(),
    "ssim_l1": lambda R, O, B: 1 - cal_ssim.ssim(O - R, B).mean() + F.l1_loss(R, O - B),
}


class StageLoss(nn.Module):
    """The same loss of every stage, summed; or that of the last stage alone."""

    def __init__(self, name: str, last_alone: bool = False):
        super().__init__()
        self.name, self.last_alone = name, last_alone

    def forward(self, rain_layers: list[Tensor], O: Tensor, B: Tensor, labels: Tensor | None = None) -> Terms:
        with without_autocast(O):  # SSIM is made of differences of nearly equal means
            losses = [STAGE_LOSSES[self.name](R, O, B) for R in rain_layers]
        return {"loss": losses[-1] if self.last_alone else torch.stack(losses).sum(), **_by_stage(losses)}


class Coarse2FineLoss(nn.Module):
    """Mean squared error of the stages' rain layers, L1 and VGG loss of the refined image.

    Coarse-to-fine, section III-D, all weights 1. Without the features of a trained VGG that term is off.
    """

    def __init__(self, refined: bool, vgg_weights: str):
        super().__init__()
        self.refined = refined
        self.features = vgg_features(vgg_weights) if refined else None
        # Buffers: values that Python copied to a GPU in each step would keep that from becoming a CUDA graph.
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
        return {"loss": torch.stack(losses).sum(), **_by_stage(losses), **terms}

    def _features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) BGR in [0, 1] to VGG's features (N, 256, H / 4, W / 4)."""
        return self.features((images.flip(1) - self.mean) / self.deviation)


class PHPLoss(nn.Module):
    """Accuracy, colour and segmentation: intensity-aware, section III-C, equations 3 to 5.

    Charbonnier's loss of X^c against the low-passed truth and of X against the truth; 1 - cosine of the pixels' colours
    in X^c and in the truth; cross entropy of what the segmentation network, which is trained along, finds in X^c. The
    last is off where there are no labels.
    """

    def __init__(self, settings: Settings, labelled: bool):
        super().__init__()
        self.sigma, self.refined = settings.lowpass_sigma, settings.refined
        self.colour_weight, self.segmentation_weight = settings.colour_weight, settings.segmentation_weight
        self.segmentation = Segmentation() if labelled else None

    def forward(self, rain_layers: list[Tensor], O: Tensor, B: Tensor, labels: Tensor | None = None) -> Terms:
        """`labels` (N, H, W) int64 are the pixels' classes."""
        coarse = O - rain_layers[0]
        # What sub-network 2 would add is asked of sub-network 1 where it is alone.
        losses = [charbonnier(coarse - (lowpass(B, self.sigma) if self.refined else B), FINE_CHARBONNIER)]
        losses += [charbonnier(O - R - B, FINE_CHARBONNIER) for R in rain_layers[1:]]
        terms, loss = {}, torch.stack(losses).sum()
        if self.colour_weight:
            terms["colour"] = colour_loss(coarse, B)
            loss = loss + self.colour_weight * terms["colour"]
        if self.segmentation and labels is not None:
            logits = self.segmentation(coarse).float()
            # All pixels may be ignored, whose mean would be nan.
            total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            terms["segmentation"] = total / (labels != IGNORED).sum().clamp(min=1)
            loss = loss + self.segmentation_weight * terms["segmentation"]
        return {"loss": loss, **_by_stage(losses), **terms}


def _by_stage(losses: list[Tensor]) -> Terms:
    return {f"stage_{t}/loss": loss for t, loss in enumerate(losses, 1)}


def lowpass(images: Tensor, sigma: float) -> Tensor:
    """Images (N, C, H, W) through a 9x9 Gaussian window, with the border's pixels around them; sigma 0: as they are."""
    if not sigma:
        return images
    offsets = torch.arange(LOWPASS, device=images.device, dtype=images.dtype) - LOWPASS // 2
    window = torch.exp(-offsets.square() / (2 * sigma**2))
    window = (window / window.sum()).expand(images.shape[1], 1, 1, -1)
    images = F.pad(images, [LOWPASS // 2] * 4, mode="replicate")
    with without_autocast(images):
        images = F.conv2d(images, window, groups=images.shape[1])
        return F.conv2d(images, window.transpose(2, 3), groups=images.shape[1])


def colour_loss(images: Tensor, truth: Tensor) -> Tensor:
    """1 - mean cosine between the pixels' colours (N, 3, H, W); black pixels, which have none, count as equal."""
    lit = truth.square().sum(1) > 0
    cosine = F.cosine_similarity(images, truth, dim=1, eps=1e-6)
    return 1 - torch.where(lit, cosine, 1.0).mean()


def vgg_features(weights: str) -> nn.Module | None:
    """VGG-16's first features, not to be trained; None, with a line, where there are no weights.

    `weights` is a file of torchvision's VGG-16, of which the features are enough; empty: the one in torchvision's
    cache. Raises UserError where it is something else.
    """
    path = Path(weights) if weights else Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE
    if not path.is_file():
        if weights:
            raise UserError(f"{path} is missing: vgg_weights is the file of torchvision's VGG-16")
        log.info(f"no weights of VGG-16 in {path}: its term of the loss is off; --vgg_weights names a file")
        return None
    layers, inputs = [], 3
    with torch.device("meta"):  # weights come from the file alone, and PyTorch's generator is left as it was
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
    except Exception as error:  # torch.load raises whatever its readers meet
        raise UserError(f"{path} holds no features of torchvision's VGG-16 ({type(error).__name__})") from None
    return features.requires_grad_(False).eval()


def wants_labels(settings: Settings) -> bool:
    """Whether the loss of a settings object has a term that compares pixels' labels."""
    return settings.loss == "php" and settings.segmentation_weight > 0


def build(settings: Settings, labelled: bool = False) -> nn.Module:
    """The loss of a settings object; `labelled`: the training pairs have labels."""
    if settings.loss == "coarse2fine":
        return Coarse2FineLoss(settings.refined, settings.vgg_weights)
    if settings.loss == "php":
        if wants_labels(settings) and not labelled:
            log.info("no folder `label` beside the training pairs: the segmentation's term of the loss is off")
        return PHPLoss(settings, labelled)
    return StageLoss(settings.loss, settings.loss_stages == "last")

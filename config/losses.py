"""Losses of the paper's stages, and `build`, which also knows those of the other networks."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cal_ssim
from base.console import log
from base.devices import without_autocast
from networks import php
from networks.base import Terms, by_stage, charbonnier
from networks.coarse2fine import Coarse2FineLoss
from settings import Settings

CHARBONNIER = 1e-3  # epsilon of the stage loss of that name

STAGE_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # of (R, O, B), the mean over the batch
    # Not mse_loss: its gradient, and that of a mean, would not be channels-last.
    "mse": lambda R, O, B: (R - (O - B)).square().sum() / R.numel(),
    "l1": lambda R, O, B: F.l1_loss(R, O - B),
    "charbonnier": lambda R, O, B: charbonnier(R - O + B, CHARBONNIER),
    "ssim": lambda R, O, B: 1 - cal_ssim.ssim(O - R, B).mean(),
    "ssim_l1": lambda R, O, B: 1 - cal_ssim.ssim(O - R, B).mean() + F.l1_loss(R, O - B),
}


class StageLoss(nn.Module):
    """The same loss for every stage, summed; or, with `last_only`, that of the last stage."""

    def __init__(self, name: str, last_only: bool = False):
        super().__init__()
        self.name, self.last_only = name, last_only

    def forward(self, rain_layers: list[Tensor], O: Tensor, B: Tensor, labels: Tensor | None = None) -> Terms:
        with without_autocast(O):  # rain_layers, O, B (N, 3, H, W); SSIM subtracts nearly equal numbers
            losses = [STAGE_LOSSES[self.name](R, O, B) for R in rain_layers]
        return {"loss": losses[-1] if self.last_only else torch.stack(losses).sum(), **by_stage(losses)}


def label_reader(settings: Settings, folder: Path) -> Callable[[Path, tuple[int, ...]], np.ndarray] | None:
    """What `CropDataset(folder, settings)` reads labels with; None if the loss uses none or there are none."""
    if settings.loss != "php" or not settings.segmentation_weight:
        return None
    folders = [Path(settings.clean_dir or folder), *map(Path, settings.more_data)]
    if any((each / php.LABELS).is_dir() for each in folders):
        return php.read_labels
    log.info(f"no folder `{php.LABELS}` beside the training images: training without the segmentation term of the loss")
    return None


def build(settings: Settings, labelled: bool = False) -> nn.Module:
    """The loss that the settings name; `labelled`: the training images have labels."""
    if settings.loss == "coarse2fine":
        return Coarse2FineLoss(settings.refined, settings.vgg_weights)
    if settings.loss == "php":
        weights = (settings.lowpass_sigma, settings.colour_weight, settings.segmentation_weight)
        return php.PHPLoss(settings.refined, *weights, labelled)
    return StageLoss(settings.loss, settings.loss_stages == "last")

"""Validation: scores of whole pairs during a training, and a picture of the first one."""

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from base import ranks
from runs.restore import Restoring, ScoredPair, score_pairs
from settings import Settings

PREVIEW_SIDE = 320  # of each image in the picture, pixels


def validate(
    network: nn.Module, criterion: nn.Module, paths: list[Path], device: torch.device, settings: Settings
) -> tuple[dict[str, float], np.ndarray | None]:
    """Scores of whole validation pairs, and rank 0's first one as a picture.

    Returns `psnr` and `ssim` of the last stage, `psnr_input`, and `stage_t/loss`, `stage_t/psnr`, `stage_t/ssim`, all
    of the 8-bit images that would be saved, and the same on every rank. The picture is None where a rank has no pair.
    """
    preview, rows = None, []
    for pair in score_pairs(network, paths, device, Restoring.of(settings)):
        if preview is None:
            preview = _side_by_side([pair.O, *pair.restored, pair.B])
        rows.append((pair.scores, _stage_losses(criterion, pair)))
    scores, losses_by_stage = (np.mean(values, 0) for values in zip(*ranks.gather(rows), strict=True))
    result = {"psnr": scores[-1][0], "ssim": scores[-1][1], "psnr_input": scores[0][0]}
    for t, (row, loss) in enumerate(zip(scores[1:], losses_by_stage, strict=True), 1):
        result |= {f"stage_{t}/loss": loss, f"stage_{t}/psnr": row[0], f"stage_{t}/ssim": row[1]}
    return result, preview


@torch.no_grad()
def _stage_losses(criterion: nn.Module, pair: ScoredPair) -> list[float]:
    O, B, *restored = (image[None].float() / 255 for image in (pair.O, pair.B, *pair.restored))
    terms = criterion([O - image for image in restored], O, B)
    return [terms[f"stage_{t}/loss"].item() for t in range(1, len(restored) + 1)]


def _side_by_side(images: list[Tensor]) -> np.ndarray:
    """Images (3, H, W) uint8 as one picture (H', W', 3), made smaller where they are large."""
    scale = min(1.0, PREVIEW_SIDE / max(images[0].shape[1:]))
    picture = np.hstack([np.moveaxis(image.cpu().numpy(), 0, 2) for image in images])
    return cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)

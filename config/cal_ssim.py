"""PSNR and SSIM, differentiable for training, and the protocol of all scores in this repository.

The protocol: restored images are rounded to 8 bits and compared whole; the score of a data set is the mean over its
images. `psnr` and `ssim` are of RGB (equal weights), `psnr_y` and `ssim_y` of the luma of MATLAB's rgb2ycbcr, rounded.
PSNR is at most 58.92 dB, that of rounding to 8 bits: equal images have a finite score, and means compare.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

METRICS = ("psnr", "ssim", "psnr_y", "ssim_y")
WINDOW, SIGMA = 11, 1.5  # Wang et al. 2004
STRIP = 512  # rows of a large image that are scored at once
ROUNDING = 1 / 12  # mean squared error of rounding to 8 bits, levels squared; the smallest that counts
LARGEST_PSNR = 10 * math.log10(255**2 / ROUNDING) + 1e-6  # dB, and the rounding of its computation


def psnr(x: Tensor, y: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal to noise ratio in dB of each image, (N, C, H, W) twice -> (N,), at most 58.92."""
    return _decibel((x - y).square().mean((1, 2, 3)) * (255 / data_range) ** 2)


def _decibel(error: Tensor) -> Tensor:
    """PSNR of mean squared errors in levels of 255, squared."""
    return 10 * torch.log10(255**2 / error.clamp(min=ROUNDING))


def ssim(x: Tensor, y: Tensor, data_range: float = 1.0) -> Tensor:
    """Structural similarity of each image, (N, C, H, W) twice -> (N,): Wang et al. 2004, inside the image."""
    if min(x.shape[-2:]) < WINDOW:
        raise ValueError(f"ssim needs H and W of at least {WINDOW}, got {tuple(x.shape)}")
    channels = x.shape[1]
    moments = torch.cat([x, y, x * x, y * y, x * y], 1)  # (N, 5 C, H, W)
    distance = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    gaussian = torch.exp(-distance.square() / (2 * SIGMA**2))
    gaussian = (gaussian / gaussian.sum()).expand(5 * channels, 1, 1, WINDOW)
    moments = F.conv2d(moments, gaussian, groups=5 * channels)
    moments = F.conv2d(moments, gaussian.transpose(2, 3), groups=5 * channels)
    mean_x, mean_y, xx, yy, xy = moments.chunk(5, 1)
    variance_x, variance_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    )
    return similarity.mean((1, 2, 3))


def to_8bit(image: Tensor) -> Tensor:
    """An image in [0, 1], clipped and rounded to uint8 values 0..255, as a file stores it."""
    return image.clamp(0, 1).mul(255).round().to(torch.uint8)


def luma(bgr: Tensor) -> Tensor:
    """Y of MATLAB's rgb2ycbcr for 8-bit images: (N, 3, H, W) uint8 in BGR order -> (N, 1, H, W) float64, 16..235."""
    weights = torch.tensor([24.966, 128.553, 65.481], dtype=torch.float64, device=bgr.device) / 255
    return ((bgr * weights[:, None, None]).sum(1, keepdim=True) + 16).round()


def scores(restored: Tensor, B: Tensor) -> dict[str, float]:
    """The METRICS of a restored image, both (3, H, W) uint8 in BGR order. SSIM is nan below its window's size."""
    device = torch.device("cpu") if restored.device.type == "mps" else restored.device  # MPS has no float64
    pair = [image.to(device)[None] for image in (restored, B)]
    height, enough, values = B.shape[-2], min(B.shape[-2:]) >= WINDOW, []
    for convert in (Tensor.double, luma):
        error = sum((x - y).square().mean((1, 3)).sum() for x, y in _strips(pair, convert, 0))
        # float32 is several times faster, and within 1e-5 of float64 on real images.
        strips = ((x.float(), y.float()) for x, y in _strips(pair, convert, WINDOW - 1)) if enough else ()
        similarity = sum(((x.shape[-2] - WINDOW + 1) * ssim(x, y, 255)[0]).double() for x, y in strips)
        values.append(_decibel(error / height))
        values.append(similarity / (height - WINDOW + 1) if enough else torch.full_like(values[0], torch.nan))
    return dict(zip(METRICS, torch.stack(values).tolist(), strict=True))


def _strips(pair: list[Tensor], convert: Callable[[Tensor], Tensor], overlap: int) -> Iterator[tuple[Tensor, ...]]:
    """Strips of the images (1, C, H, W) uint8 after `convert`, which overlap by so many rows."""
    for top in range(0, pair[0].shape[-2] - overlap, STRIP):
        yield tuple(convert(image[..., top : top + STRIP + overlap, :]) for image in pair)

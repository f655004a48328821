"""PSNR, SSIM and luma against scikit-image, on its own photographs."""

import numpy as np
import pytest
import skimage.data
import torch
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import cal_ssim
from cal_ssim import luma, psnr, scores, ssim, to_8bit

PHOTOGRAPHS = ["astronaut", "coffee", "chelsea"]


def rainy_photograph(name):
    """A photograph and the same under noise, BGR, (3, H, W) uint8 tensors."""
    clean = np.ascontiguousarray(getattr(skimage.data, name)()[..., ::-1])
    noise = np.random.default_rng(0).normal(0, 25, (*clean.shape[:2], 1))
    noisy = np.clip(clean + noise, 0, 255).astype(np.uint8)
    return tuple(torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in (noisy, clean))


def reference_ssim(x, y):
    return structural_similarity(
        x, y, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=0
    )


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_scores_are_scikit_images(name):
    noisy, clean = rainy_photograph(name)
    result = scores(noisy, clean)
    x, y = noisy.numpy(), clean.numpy()
    assert result["psnr"] == pytest.approx(peak_signal_noise_ratio(y, x), abs=1e-6)
    assert result["ssim"] == pytest.approx(reference_ssim(x, y), abs=1e-4)
    x, y = (np.round(rgb2ycbcr(image[::-1].transpose(1, 2, 0))[..., 0])[None] for image in (x, y))
    assert result["psnr_y"] == pytest.approx(peak_signal_noise_ratio(y, x, data_range=255), abs=1e-3)
    assert result["ssim_y"] == pytest.approx(reference_ssim(x, y), abs=1e-4)


@pytest.mark.parametrize("strip", [1, 7, 290, 10000])
def test_ssim_does_not_depend_on_the_strips(strip, monkeypatch):
    noisy, clean = rainy_photograph(PHOTOGRAPHS[0])
    whole = ssim(noisy[None].float(), clean[None].float(), 255).item()
    monkeypatch.setattr(cal_ssim, "STRIP", strip)
    assert scores(noisy, clean)["ssim"] == pytest.approx(whole, abs=1e-6)


def test_differentiable_ssim_agrees_in_float32():
    noisy, clean = rainy_photograph("coffee")
    value = ssim(noisy[None].float() / 255, clean[None].float() / 255).item()
    assert value == pytest.approx(reference_ssim(noisy.numpy(), clean.numpy()), abs=1e-4)


def test_ssim_gradient():
    torch.manual_seed(0)
    x = torch.rand(1, 1, 12, 13, dtype=torch.float64, requires_grad=True)
    y = torch.rand(1, 1, 12, 13, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ssim(x, y), (x,))


def test_equal_images_have_the_score_of_rounding_to_8_bits():
    x = torch.rand(2, 3, 300, 300)
    assert torch.allclose(ssim(x, x), torch.ones(2))
    rounded = psnr(x.double(), to_8bit(x) / 255).mean().item()
    assert psnr(x, x).tolist() == pytest.approx([rounded] * 2, abs=0.03)
    assert psnr(255 * x, 255 * x, 255).tolist() == psnr(x, x).tolist()
    black = torch.zeros(3, 20, 20, dtype=torch.uint8)
    nearly = black.clone()
    nearly[0, 3, 3] = 1
    for image in (black, nearly):
        found = scores(image, black)
        assert [found["psnr"], found["psnr_y"]] == pytest.approx([rounded] * 2, abs=0.03)


def test_an_empty_batch_has_no_scores():
    x = torch.rand(0, 3, 20, 20)
    assert psnr(x, x).shape == ssim(x, x).shape == (0,)


def test_luma_is_matlabs():
    """MATLAB: rgb2ycbcr(uint8(cat(3, 255, 0, 0))) has Y = 81; green 145, blue 41, white 235, black 16."""
    bgr = torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 0], [255, 255, 255], [0, 0, 0]], dtype=torch.uint8)
    assert luma(bgr.T.reshape(1, 3, 1, 5)).flatten().tolist() == [81, 145, 41, 235, 16]


def test_to_8bit_rounds_and_clips():
    assert to_8bit(torch.tensor([-0.1, 0.5 / 255 + 1e-6, 0.4 / 255, 1.2])).tolist() == [0, 1, 0, 255]


def test_too_small_for_the_window():
    x = torch.rand(1, 3, 10, 40)
    with pytest.raises(ValueError, match="at least 11"):
        ssim(x, x)
    small = torch.zeros(3, 10, 40, dtype=torch.uint8)
    result = scores(small, small + 1)
    assert np.isnan(result["ssim"])
    assert result["psnr"] == pytest.approx(20 * np.log10(255))


def test_each_image_of_a_batch_is_scored_alone():
    torch.manual_seed(0)
    x, y = torch.rand(3, 3, 16, 16), torch.rand(3, 3, 16, 16)
    for measure in (psnr, ssim):
        alone = torch.cat([measure(x[i : i + 1], y[i : i + 1]) for i in range(3)])
        assert torch.allclose(measure(x, y), alone, atol=1e-6)
    assert cal_ssim.METRICS == ("psnr", "ssim", "psnr_y", "ssim_y")

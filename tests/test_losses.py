"""The stage losses against their formulas written down in numpy, and which loss the settings choose."""

import numpy as np
import pytest
import torch

import losses
from by_hand import charbonnier, mean_absolute, mean_square, near, random_images
from losses import STAGE_LOSSES, StageLoss
from networks import php
from settings import resolve


def ssim(x, y):
    """Of batches (N, C, H, W): the mean over all places of an 11x11 Gaussian window of sigma 1.5."""
    window = np.exp(-np.square(np.arange(11) - 5) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    found = []
    for a, b in zip(*(planes.double().flatten(0, 1).numpy() for planes in (x, y)), strict=True):
        for top in range(a.shape[0] - 10):
            for left in range(a.shape[1] - 10):
                p, q = (image[top : top + 11, left : left + 11] for image in (a, b))
                mean_p, mean_q = (window * p).sum(), (window * q).sum()
                covariance = (window * (p - mean_p) * (q - mean_q)).sum()
                variances = (window * (p - mean_p) ** 2).sum() + (window * (q - mean_q) ** 2).sum()
                luminance = (2 * mean_p * mean_q + 0.01**2) / (mean_p**2 + mean_q**2 + 0.01**2)
                found.append(luminance * (2 * covariance + 0.03**2) / (variances + 0.03**2))
    return np.mean(found)


BY_HAND = {
    "mse": lambda R, O, B: mean_square(R - (O - B)),
    "l1": lambda R, O, B: mean_absolute(R - (O - B)),
    "charbonnier": lambda R, O, B: charbonnier(R - (O - B), 1e-3),
    "ssim": lambda R, O, B: 1 - ssim(O - R, B),
    "ssim_l1": lambda R, O, B: 1 - ssim(O - R, B) + mean_absolute(R - (O - B)),
}


def test_every_stage_loss_has_its_formula_here():
    assert BY_HAND.keys() == STAGE_LOSSES.keys()


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("name", STAGE_LOSSES)
def test_stage_losses_by_hand(name, last_only):
    *rain_layers, O, B = random_images(5)
    wanted = [BY_HAND[name](R, O, B) for R in rain_layers]
    assert max(wanted) > 1.001 * min(wanted)  # no stage can stand for another
    terms = StageLoss(name, last_only)(rain_layers, O, B)
    assert list(terms) == ["loss", "stage_1/loss", "stage_2/loss", "stage_3/loss"]
    assert all(near(terms[f"stage_{t}/loss"], value) for t, value in enumerate(wanted, 1))
    assert near(terms["loss"], wanted[-1] if last_only else sum(wanted))


def test_charbonnier_is_flat_at_zero_and_absolute_far_from_it():
    O, B = torch.full((1, 3, 4, 4), 0.5), torch.zeros(1, 3, 4, 4)
    for error, slope in ((0.0, 0.0), (0.5, 1.0), (-0.5, -1.0)):
        R = (O - B + error).requires_grad_()
        loss = STAGE_LOSSES["charbonnier"](R, O, B)
        loss.backward()
        assert loss.item() == pytest.approx(abs(error), abs=1.1 * losses.CHARBONNIER)
        assert torch.allclose(R.grad * R.numel(), torch.full_like(R, slope), atol=1e-5)


@pytest.mark.parametrize("name", STAGE_LOSSES)
def test_stage_losses_are_float32_within_autocast(name):
    """Differences of means of squares are nothing for eight bits: SSIM was a quarter off."""
    B, noise = random_images(2, 20, 20)
    O, criterion = B + 0.3, StageLoss(name)
    rain_layers = [0.3 + 0.01 * noise]
    wanted = criterion(rain_layers, O, B)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        found = criterion(rain_layers, O, B)["loss"]
    assert found.dtype == torch.float32
    assert near(found, wanted.item(), 1e-6)


def test_build_takes_the_settings():
    built = losses.build(resolve("sdsen", {"loss": "l1", "loss_stages": "last"}))
    assert (type(built), built.name, built.last_only) == (StageLoss, "l1", True)
    assert not losses.build(resolve("coarse2fine", {"loss": "mse"})).last_only


def test_labels_are_read_where_the_loss_compares_them_and_there_are_some(tmp_path):
    pairs, clean = tmp_path / "pairs", tmp_path / "clean"
    (pairs / "label").mkdir(parents=True)
    clean.mkdir()
    for name in ("php_acc_col", "sdsen", "coarse2fine"):
        assert losses.label_reader(resolve(name), pairs) is None
    assert losses.label_reader(resolve("php"), pairs) is php.read_labels
    assert losses.label_reader(resolve("php"), clean) is None
    synthetic = {"rain": "rain800", "clean_dir": str(clean)}
    assert losses.label_reader(resolve("php", synthetic), pairs) is None  # the pairs are not read
    assert losses.label_reader(resolve("php", {**synthetic, "more_data": (str(pairs),)}), clean) is php.read_labels

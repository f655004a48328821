"""Terms of the losses, written down in numpy."""

import numpy as np
import pytest
import torch


def random_images(count, height=12, width=13, seed=0):
    """`count` batches (2, 3, H, W) in [0, 1]."""
    return torch.rand(count, 2, 3, height, width, generator=torch.Generator().manual_seed(seed))


def near(tensor, value, tolerance=1e-5):
    return tensor.dim() == 0 and tensor.item() == pytest.approx(value, rel=tolerance)


def mean_square(x):
    return np.square(x.double().numpy()).mean()


def mean_absolute(x):
    return np.abs(x.double().numpy()).mean()


def charbonnier(x, epsilon):
    return np.sqrt(np.square(x.double().numpy()) + epsilon**2).mean()

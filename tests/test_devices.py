"""Devices, precision, and the errors of full memory."""

import pytest
import torch

import devices
from common import UserError


def test_pick_device():
    assert devices.pick_device("cpu").type == "cpu"
    there = torch.cuda.is_available() or torch.backends.mps.is_available()
    assert (devices.pick_device("auto").type != "cpu") == there
    with pytest.raises(UserError, match="none of auto"):
        devices.pick_device("gpu0")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="PyTorch sees no such device here; there is"):
            devices.pick_device("cuda")

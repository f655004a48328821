"""The pretrained weights: small, safe to load, as their checksums say, and worth having."""

import hashlib

import numpy as np
import pytest
import torch

import model
from base.files import ROOT
from base.images import read_image, to_bgr8
from cal_ssim import scores
from dataset import to_tensor
from runs import checkpoints
from runs.restore import restore_8bit
from synthesis.streaks import add_rain
from synthesis.styles import STYLES

MODELS = ROOT / "models"
SHIPPED = {  # name: stages, style of rain that it was trained for, dB that it must gain there
    "photographs": (4, "rain100h", 8.0),
    "rain800": (8, "rain800", 2.0),
    "rain100h": (6, "rain100h", 8.0),
    "rain800_fast": (1, "rain800", 2.0),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_are_the_network_and_its_settings_alone(name):
    path = MODELS / f"{name}.pth"
    data = path.read_bytes()
    assert len(data) < 1_000_000
    assert f"{hashlib.sha256(data).hexdigest()}  {name}.pth" in (MODELS / "SHA256SUMS").read_text().splitlines()
    values = torch.load(path, weights_only=True)
    assert [values[field] for field in ("optimizer", "random", "average", "criterion")] == [None] * 4
    assert not [value for value in values["settings"].values() if str(value).startswith("/")]  # no folder of a machine
    assert values["settings"]["run"] == name  # results land in showdir/NAME
    assert f"`{name}.pth`" in (ROOT / "docs" / "WEIGHTS.md").read_text()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_take_rain_off_a_photograph(name):
    stages, style, gain = SHIPPED[name]
    path = MODELS / f"{name}.pth"
    checkpoint = checkpoints.load(path)
    network = model.build(checkpoint.settings).eval()
    checkpoints.load_weights(network, checkpoint, path)
    assert network.output_num == stages
    B = to_bgr8(read_image(ROOT / "docs" / "pictures" / "chelsea.jpg"))
    B = np.ascontiguousarray(B[-200:, -200:])  # the right third is clean
    O = add_rain(B, STYLES[style], np.random.default_rng(3))
    restored = restore_8bit(network, to_tensor(O), torch.device("cpu"))[-1]
    before, after = (scores(image, to_tensor(B))["psnr"] for image in (to_tensor(O), restored))
    assert after > before + gain

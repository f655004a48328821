"""Fixtures: small data sets in memory or in a temporary folder, and the devices that there are."""

import base.openmp  # noqa: F401

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from base.devices import pick_device
from fake_cuda import FakeCuda

GOLDEN = Path(__file__).parent / "golden"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"))]


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return pick_device(request.param)  # which makes float32 on a GPU float32


@pytest.fixture
def cards(monkeypatch):
    """Makes a machine with GPUs of these compute capabilities: `cards((8, 0), (7, 5))`."""

    def make(*capabilities: tuple[int, int]) -> FakeCuda:
        fake = FakeCuda(*capabilities)
        fake.install(monkeypatch)
        return fake

    return make


def make_pair(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A smooth clean image and the same under streaks: (B, O), each (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    B = cv2.resize(rng.integers(20, 200, (5, 5, 3)).astype(np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    rain = cv2.blur((rng.random((height, width)) < 0.05).astype(np.float32), (1, 9)) * 500
    O = np.clip(B + np.minimum(rain, 90)[..., None], 0, 255).astype(np.uint8)
    return B, O


VGG_CHANNELS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256)}


def write_vgg(path: Path) -> dict[str, torch.Tensor]:
    """A file of VGG-16's first features with random weights, under torchvision's names; returns these weights."""
    generator, state = torch.Generator().manual_seed(0), {}
    for index, (inputs, outputs) in VGG_CHANNELS.items():
        weight = torch.randn(outputs, inputs, 3, 3, generator=generator) * (2 / (9 * inputs)) ** 0.5
        state[f"features.{index}.weight"] = weight
        state[f"features.{index}.bias"] = 0.1 * torch.randn(outputs, generator=generator)
    torch.save({**state, "features.17.weight": torch.zeros(1), "classifier.0.weight": torch.zeros(2)}, path)
    return state


@pytest.fixture
def data_dir(tmp_path) -> Path:
    """A data set of joined pairs: 5 to train, 3 to validate, 2 to test, of two sizes."""
    for split, count in (("train", 5), ("val", 3), ("test", 2)):
        folder = tmp_path / "data" / split
        folder.mkdir(parents=True)
        for index in range(count):
            B, O = make_pair(40 + 7 * (index % 2), 48, seed=10 * count + index)
            cv2.imwrite(str(folder / f"{index}.png"), np.hstack([B, O]))
    return tmp_path / "data"


@pytest.fixture
def places(tmp_path, data_dir, monkeypatch) -> list[str]:
    """The words that send everything to a temporary folder; there are no weights in torchvision's cache."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    folders = {name: tmp_path / name for name in ("model_dir", "log_dir", "show_dir")}
    return [word for name, folder in {**folders, "data_dir": data_dir}.items() for word in (f"--{name}", str(folder))]


@pytest.fixture
def label_dir(data_dir) -> Path:
    """Labels of all training pairs: the clean image's dark, middle and bright pixels, of which the latter have none."""
    folder = data_dir / "train" / "label"
    folder.mkdir()
    for path in sorted((data_dir / "train").glob("*.png")):
        level = cv2.imread(str(path))[:, :48, 0]
        cv2.imwrite(str(folder / path.name), np.select([level < 80, level < 140], [0, 18], 255).astype(np.uint8))
    return folder

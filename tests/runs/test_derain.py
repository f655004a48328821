"""Pretrained weights as a module: RGB in and out, any size, number and type; the files are checked."""

import shutil
from collections import deque

import pytest
import torch

from base.errors import DamagedFile, MissingFile
from base.files import ROOT
from fast import windows
from runs import derain
from runs.restore import Restoring, open_network, restore

FAST = "rain800_fast"


@pytest.fixture
def loaded(device):
    return derain.load(FAST).to(device)


def images(number=2, height=23, width=31):
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_it_gives_the_last_stage_in_the_colours_of_its_input(device):
    network = open_network(None, "photographs", {"device": str(device)}).network
    found = derain.load("photographs").to(device)(images())
    for O, result in zip(images(), found, strict=True):
        (wanted,) = deque(restore(network, O.flip(0).to(device), Restoring()), 1)
        assert torch.equal(result, wanted.flip(0).cpu())
    assert (found.flip(1) - images()).abs().mean() > (found - images()).abs().mean()


def test_any_number_type_and_memory_of_images(loaded):
    whole = loaded(images())
    assert not whole.requires_grad
    assert loaded(images()[:0]).shape == (0, 3, 23, 31)
    assert (loaded(images()[1:]) - whole[1:]).abs().max() < 1e-5
    assert loaded(images().double()).dtype == torch.float64
    last = images().contiguous(memory_format=torch.channels_last)
    assert (loaded(last) - whole).abs().max() < 1e-5


def test_a_large_image_goes_through_in_parts_without_seams(monkeypatch):
    """In windows, as without a compiler: the module asks for no more memory than `restore`."""
    network = derain.load(FAST)
    whole = network(images(1, 70, 31))
    monkeypatch.setattr(windows, "CPU_PIXELS", 31 * 8)
    monkeypatch.setattr("fast.strips.fit", lambda network, O: False)
    assert (network(images(1, 70, 31)) - whole).abs().max() < 1e-5


@pytest.mark.parametrize("wrong", [images()[0], images()[:, :1], images()[:, :, :0], (255 * images()).byte()])
def test_what_is_no_image(loaded, wrong):
    with pytest.raises(ValueError, match="expects"):
        loaded(wrong)


def test_float32_is_exact_only_within_it(loaded, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    within = []
    loaded.network.register_forward_pre_hook(lambda *_: within.append(torch.backends.cudnn.allow_tf32))
    monkeypatch.setattr("fast.strips.fit", lambda network, O: False)
    loaded(images())
    assert set(within) == {False}
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("name", ["", "sdsen", "../models/photographs", "photographs.pth", "SHA256SUMS"])
def test_names_that_are_no_pretrained_weights(name):
    with pytest.raises(MissingFile):
        derain.load(name)


def test_weights_are_compared_with_their_checksum(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    shutil.copy(ROOT / "models" / "SHA256SUMS", tmp_path / "models")
    monkeypatch.setattr(derain, "ROOT", tmp_path)
    with pytest.raises(MissingFile):
        derain.load(FAST)
    shutil.copy(ROOT / "models" / "rain800.pth", tmp_path / "models" / f"{FAST}.pth")
    with pytest.raises(DamagedFile):
        derain.load(FAST)

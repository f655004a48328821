"""Whole images through a network, and the network that a command names."""

import cv2
import numpy as np
import pytest
import torch

import model
from base.devices import compute_dtype
from base.errors import UserError
from cal_ssim import METRICS, scores
from dataset import list_pairs, read_whole
from fast import convolution, strips
from fast.any_size import rain_layers
from runs import checkpoints
from runs import restore as evaluate
from runs.checkpoints import Checkpoint
from settings import resolve

CPU = torch.device("cpu")


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of a small network in tmp_path/models/tiny, and the overrides that find it."""
    settings = resolve("sdsen_s2", {"channel": 2, "depth": 4, "run": "tiny", "lr": 0.125})
    torch.manual_seed(0)
    network = model.build(settings)
    checkpoints.save(tmp_path / "models" / "tiny" / "latest.pth", Checkpoint(network.state_dict(), 5, settings))
    return network, {"model_dir": str(tmp_path / "models")}


def test_open_network_rebuilds_it_from_the_checkpoint(saved):
    network, overrides = saved
    opened, settings, path, step = evaluate.open_network(None, "tiny", overrides)
    assert (settings.channel, settings.stage_num, settings.lr, step, path.stem) == (2, 2, 0.125, 5, "latest")
    assert not opened.training
    O = torch.rand(1, 3, 9, 9)
    for R, other in zip(opened(O), network(O), strict=True):
        assert torch.equal(R, other)


def test_open_network_by_run_and_with_fewer_stages(saved):
    opened, *_ = evaluate.open_network(None, None, {**saved[1], "run": "tiny", "stage_num": 1})
    assert len(opened(torch.rand(1, 3, 9, 9))) == 1


def test_open_network_refuses_another_preset(saved):
    with pytest.raises(UserError, match="has channel 2, preset sdsen_s2 10"):
        evaluate.open_network("sdsen_s2", "tiny", saved[1])
    with pytest.raises(UserError, match="belongs to another network"):
        evaluate.open_network(None, "tiny", {**saved[1], "link": "none"})


def test_restore_subtracts_the_rain_layer(saved, device):
    network = saved[0].eval().to(device)
    O = torch.rand(3, 13, 8, device=device)
    with torch.no_grad():
        expected = [(O - R[0]).clamp(0, 1) for R in network(O[None])]
    for image, other in zip(evaluate.restore(network, O, precision="float32"), expected, strict=True):
        assert (image - other).abs().max() < 1e-6  # forward goes another way on the CPU
    assert len(list(evaluate.restore(network, O, 1))) == 1


@pytest.mark.parametrize("precision", ["auto", "fp16", "bf16"])
def test_16_bits_are_near_float32(saved, device, precision):
    network, O = saved[0].eval().to(device), torch.rand(3, 33, 28, device=device)
    wanted, found = (torch.stack(list(evaluate.restore(network, O, precision=p))) for p in ("float32", precision))
    bound = {torch.float32: 0.0, torch.float16: 0.25, torch.bfloat16: 1.0}  # of 255 levels
    dtype = compute_dtype(precision, device)
    assert (found.dtype, found.device) == (torch.float32, O.device)
    assert 255 * (found - wanted).abs().quantile(0.999) <= bound[dtype]
    assert torch.equal(found, wanted) == (dtype == torch.float32)


def test_images_are_float32_where_the_ends_are_not(saved, monkeypatch):
    """On MPS, whose autocast the network does not see."""
    for module in (convolution, model):
        monkeypatch.setattr(module, "autocast_dtype", lambda x: None)
    network, O = saved[0].eval(), torch.rand(3, 13, 8)
    monkeypatch.setattr(strips, "fit", lambda *_: False)
    for image in evaluate.restore(network, O, precision="bf16"):
        assert image.dtype == torch.float32
        assert not torch.equal(image, image.bfloat16())  # as fine as the input


@pytest.mark.parametrize("mirror", [False, True])
def test_what_float16_cannot_hold_is_computed_in_float32(saved, device, mirror):
    network, O = saved[0].eval().to(device), torch.rand(3, 13, 8, device=device)
    with torch.no_grad():
        network.re_layer[0].weight.mul_(3e5)
    with torch.autocast(device.type, torch.float16), torch.no_grad():
        assert not network(O[None])[0].isfinite().all()
    found = list(evaluate.restore(network, O, precision="fp16", mirror=mirror))
    wanted = list(evaluate.restore(network, O, precision="float32", mirror=mirror))
    assert len(found) == 2
    for image, other in zip(found, wanted, strict=True):
        assert image.isfinite().all()
        assert (image - other).abs().max() < 1e-6


def test_a_later_stage_that_float16_cannot_hold(saved):
    network, O = saved[0].eval(), torch.rand(3, 13, 8)
    with torch.no_grad():
        network.connect_layers[0].conv0.weight.mul_(1e7)
        network.connect_layers[0].conv0.bias.zero_()
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        first, second = network(O[None])
    assert first.isfinite().all()
    assert not second.isfinite().all()
    found = list(evaluate.restore(network, O, precision="fp16"))
    wanted = list(evaluate.restore(network, O, precision="float32"))
    assert 0 < (found[0] - wanted[0]).abs().max() < 1e-2  # this one was in range
    assert torch.equal(found[1], wanted[1])


def test_mirror_takes_the_mean_with_the_mirrored_image(saved, device):
    network = saved[0].eval().to(device)
    O = torch.rand(3, 13, 8, device=device)
    plain = list(rain_layers(network, O))
    mirrored = [R.flip(-1) for R in rain_layers(network, O.flip(-1))]
    restored = list(evaluate.restore(network, O, precision="float32", mirror=True))
    assert len(restored) == 2
    for image, R, other in zip(restored, plain, mirrored, strict=True):
        assert (R - other).abs().max() > 1e-3  # p4 knows quarter turns, but not mirroring
        assert (image - (O - (R + other) / 2).clamp(0, 1)).abs().max() < 1e-6
    again = evaluate.restore(network, O.flip(-1), precision="float32", mirror=True)
    for image, other in zip(again, restored, strict=True):
        assert (image.flip(-1) - other).abs().max() < 1e-6
    assert len(list(evaluate.restore(network, O, 1, mirror=True))) == 1


def test_mirroring_shows_its_progress_once(saved, monkeypatch):
    shares = []
    monkeypatch.setattr(evaluate.tqdm, "update", lambda bar, share: shares.append(share))
    list(evaluate.restore(saved[0].eval(), torch.rand(3, 40, 8), mirror=True))
    assert sum(shares) == pytest.approx(1)


def test_mirroring_is_the_commands_choice_not_the_checkpoints(saved, tmp_path):
    _, overrides = saved
    _, settings, *_ = evaluate.open_network(None, "tiny", {**overrides, "mirror": True})
    assert evaluate.how_to_restore(settings) == (0.0, "auto", True)
    checkpoints.save(tmp_path / "models/mirroring.pth", Checkpoint(saved[0].state_dict(), 5, settings))
    assert not evaluate.open_network(None, "mirroring", overrides)[1].mirror


def test_score_pairs_is_the_scores_of_8bit_images(saved, data_dir):
    network = saved[0].train()
    paths = list_pairs(data_dir / "val")
    table, seen = evaluate.score_pairs(network, paths, CPU, lambda path, *_: path)
    assert table.shape == (3, 3, 4)  # pairs, input and two stages, metrics
    assert seen == paths
    assert network.training
    O, B = read_whole(paths[1])
    restored = evaluate.restore_8bit(network.eval(), O, CPU)[1]
    assert restored.dtype == torch.uint8
    for row, image in ((table[1, 0], O), (table[1, 2], restored)):
        np.testing.assert_allclose(row, [scores(image, B)[metric] for metric in METRICS])
    joined = cv2.imread(str(paths[1])).astype(float)
    mse = ((joined[:, :48] - joined[:, 48:]) ** 2).mean()
    assert table[1, 0, 0] == pytest.approx(10 * np.log10(255**2 / mse))


def test_pairs_are_scored_where_they_are_restored(saved, data_dir, device):
    network, paths = saved[0].to(device), list_pairs(data_dir / "val")
    how = (0.0, "float32", False)
    devices = []
    table, _ = evaluate.score_pairs(
        network, paths, device, lambda path, O, restored, B, rows: devices.extend([O, B, *restored]), *how
    )
    assert {image.device for image in devices} == {device}
    assert {image.dtype for image in devices} == {torch.uint8}
    expected, _ = evaluate.score_pairs(network.cpu(), paths, CPU, lambda *_: None, *how)
    assert np.abs(table - expected).max() < (0.02 if device.type == "cuda" else 1e-12)  # a level here and there

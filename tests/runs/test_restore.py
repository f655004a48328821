"""Whole images through a network, and the network that a command names."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import model
from base.devices import compute_dtype
from base.errors import DamagedFile, Mismatch, NotFinite
from cal_ssim import METRICS, scores
from dataset import list_pairs, read_whole
from fast import convolution, strips, windows
from fast.any_size import rain_layers
from runs import checkpoints
from runs import restore as restoring
from runs.checkpoints import Checkpoint
from runs.restore import Restoring, open_network, restore, restore_8bit, score_pairs
from settings import resolve

CPU, FLOAT32 = torch.device("cpu"), Restoring(precision="float32")


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
    opened, settings, path, step = open_network(None, "tiny", overrides)
    assert (settings.channel, settings.stage_num, settings.lr, step, path.stem) == (2, 2, 0.125, 5, "latest")
    assert not opened.training
    O = torch.rand(1, 3, 9, 9)
    for R, other in zip(opened(O), network(O), strict=True):
        assert torch.equal(R, other)


def test_open_network_takes_what_concerns_the_command_from_the_command(saved):
    """Such as the precision, in which the training may have been another one."""
    folder = saved[1]["model_dir"]
    trained = {"precision": "bf16", "mirror": True, "cuda_graphs": "on", "device": "mps", "log_dir": "/elsewhere"}
    settings = resolve("sdsen_s2", {"channel": 2, "depth": 4, "run": "tiny", **trained})
    checkpoints.save(Path(folder) / "tiny" / "latest.pth", Checkpoint(saved[0].state_dict(), 5, settings))
    opened = open_network(None, "tiny", saved[1]).settings
    assert all(getattr(opened, name) == getattr(resolve(), name) for name in trained)
    assert opened.model_dir == folder


def test_open_network_by_run_and_with_fewer_stages(saved):
    opened, *_ = open_network(None, None, {**saved[1], "run": "tiny", "stage_num": 1})
    assert len(opened(torch.rand(1, 3, 9, 9))) == 1


def test_open_network_refuses_another_preset(saved):
    with pytest.raises(Mismatch, match="channel"):
        open_network("sdsen_s2", "tiny", saved[1])
    with pytest.raises(Mismatch):
        open_network(None, "tiny", {**saved[1], "link": "none"})


def test_restore_subtracts_the_rain_layer(saved, device):
    network = saved[0].eval().to(device)
    O = torch.rand(3, 13, 8, device=device)
    with torch.no_grad():
        expected = [(O - R[0]).clamp(0, 1) for R in network(O[None])]
    for image, other in zip(restore(network, O, FLOAT32), expected, strict=True):
        assert (image - other).abs().max() < 1e-6  # forward goes another way on the CPU
    assert len(list(restore(network, O, stage_num=1))) == 1


@pytest.mark.parametrize("precision", ["auto", "fp16", "bf16"])
def test_16_bits_are_near_float32(saved, device, precision):
    network, O = saved[0].eval().to(device), torch.rand(3, 33, 28, device=device)
    expected, restored = (
        torch.stack(list(restore(network, O, Restoring(precision=p)))) for p in ("float32", precision)
    )
    bound = {torch.float32: 0.0, torch.float16: 0.25, torch.bfloat16: 1.0}  # of 255 levels
    dtype = compute_dtype(precision, device)
    assert (restored.dtype, restored.device) == (torch.float32, O.device)
    assert 255 * (restored - expected).abs().quantile(0.999) <= bound[dtype]
    assert torch.equal(restored, expected) == (dtype == torch.float32)


def test_images_are_float32_where_the_ends_are_not(saved, monkeypatch):
    """On MPS, whose autocast the network does not see."""
    for module in (convolution, model):
        monkeypatch.setattr(module, "autocast_dtype", lambda x: None)
    network, O = saved[0].eval(), torch.rand(3, 13, 8)
    monkeypatch.setattr(strips, "fit", lambda *_: False)
    for image in restore(network, O, Restoring(precision="bf16")):
        assert image.dtype == torch.float32
        assert not torch.equal(image, image.bfloat16())  # as fine as the input


@pytest.mark.parametrize("mirror", [False, True])
def test_what_float16_cannot_hold_is_computed_in_float32(saved, device, mirror):
    network, O = saved[0].eval().to(device), torch.rand(3, 13, 8, device=device)
    with torch.no_grad():
        network.re_layer[0].weight.mul_(3e5)
    with torch.autocast(device.type, torch.float16), torch.no_grad():
        assert not network(O[None])[0].isfinite().all()
    restored = list(restore(network, O, Restoring(0.0, "fp16", mirror)))
    expected = list(restore(network, O, Restoring(0.0, "float32", mirror)))
    assert len(restored) == 2
    for image, other in zip(restored, expected, strict=True):
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
    restored = list(restore(network, O, Restoring(precision="fp16")))
    expected = list(restore(network, O, FLOAT32))
    assert 0 < (restored[0] - expected[0]).abs().max() < 1e-2  # this one was in range
    assert torch.equal(restored[1], expected[1])


def test_mirror_takes_the_mean_with_the_mirrored_image(saved, device):
    network = saved[0].eval().to(device)
    O = torch.rand(3, 13, 8, device=device)
    plain = list(rain_layers(network, O))
    mirrored = [R.flip(-1) for R in rain_layers(network, O.flip(-1))]
    restored = list(restore(network, O, Restoring(0.0, "float32", True)))
    assert len(restored) == 2
    for image, R, other in zip(restored, plain, mirrored, strict=True):
        assert (R - other).abs().max() > 1e-3  # p4 knows quarter turns, but not mirroring
        assert (image - (O - (R + other) / 2).clamp(0, 1)).abs().max() < 1e-6
    again = restore(network, O.flip(-1), Restoring(0.0, "float32", True))
    for image, other in zip(again, restored, strict=True):
        assert (image.flip(-1) - other).abs().max() < 1e-6
    assert len(list(restore(network, O, Restoring(mirror=True), 1))) == 1


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("in_windows", [False, True])
def test_the_shares_of_an_images_progress_add_up_to_one(monkeypatch, mirror, in_windows):
    network, shares = model.build(resolve("sdsen_s2", {"depth": 4})).eval(), []
    monkeypatch.setattr(restoring.Progress, "update", lambda bar, share: shares.append(share))
    if in_windows:
        monkeypatch.setattr(strips, "fit", lambda *_: False)
        monkeypatch.setattr(windows, "CPU_PIXELS", 8 * 12)  # of 12 rows, the last one of 4
    else:
        monkeypatch.setattr(strips, "STRIP_TILES", 6)
    list(restore(network, torch.rand(3, 40, 8), Restoring(0, "float32", mirror)))
    assert len(shares) > 4
    assert sum(shares) == pytest.approx(1)


def test_a_preview_has_rows_of_four_images_each_below_its_name():
    images = {f"stage {t}": torch.full((3, 30, 50), 25 * t, dtype=torch.uint8) for t in range(10)}
    picture = restoring._labelled(images)
    assert picture.shape == (3 * (restoring.BAND + 30), 4 * 50, 3)
    for t in range(10):
        top, left = (t // 4) * (restoring.BAND + 30), t % 4 * 50
        band, image = np.split(picture[top : top + restoring.BAND + 30, left : left + 50], [restoring.BAND])
        assert (image == 25 * t).all()
        assert band.max() == 255 != band.min()  # something is written there
    assert (picture[-30:, 100:] == 255).all()
    wide = restoring._labelled({"input": torch.zeros(3, 100, 4000, dtype=torch.uint8)})
    assert wide.shape == (restoring.BAND + 8, restoring.PREVIEW_SIDE, 3)


def test_mirroring_is_the_commands_choice_not_the_checkpoints(saved, tmp_path):
    _, overrides = saved
    _, settings, *_ = open_network(None, "tiny", {**overrides, "mirror": True})
    assert Restoring.of(settings) == Restoring(0.0, "auto", True)
    checkpoints.save(tmp_path / "models/mirroring.pth", Checkpoint(saved[0].state_dict(), 5, settings))
    assert not open_network(None, "mirroring", overrides)[1].mirror


def test_scores_are_those_of_8bit_images(saved, data_dir):
    network = saved[0].train()
    paths = list_pairs(data_dir / "val")
    pairs = list(score_pairs(network, paths, CPU))
    assert [pair.path for pair in pairs] == paths
    assert network.training
    O, B = read_whole(paths[1])
    restored = restore_8bit(network.eval(), O, CPU)
    assert restored[1].dtype == torch.uint8
    assert pairs[1].scores.shape == (3, 4)  # input and two stages, metrics
    for row, image in zip(pairs[1].scores, (O, *restored), strict=True):
        np.testing.assert_allclose(row, [scores(image, B)[metric] for metric in METRICS])
    joined = cv2.imread(str(paths[1])).astype(float)
    mse = ((joined[:, :48] - joined[:, 48:]) ** 2).mean()
    assert pairs[1].scores[0, 0] == pytest.approx(10 * np.log10(255**2 / mse))


def test_a_network_is_back_in_its_mode_where_the_pairs_are_not_all_taken(saved, data_dir):
    network = saved[0].train()
    pairs = score_pairs(network, list_pairs(data_dir / "val"), CPU)
    next(pairs)
    assert not network.training
    pairs.close()
    assert network.training


def test_pairs_are_scored_where_they_are_restored(saved, data_dir, device):
    network, paths = saved[0].to(device), list_pairs(data_dir / "val")
    pairs = list(score_pairs(network, paths, device, FLOAT32))
    images = [image for pair in pairs for image in (pair.O, pair.B, *pair.restored)]
    assert {(image.device, image.dtype) for image in images} == {(device, torch.uint8)}
    for pair, other in zip(pairs, score_pairs(network.cpu(), paths, CPU, FLOAT32), strict=True):
        # On a GPU, a pixel here and there differs by a level.
        assert np.abs(pair.scores - other.scores).max() < (0.02 if device.type == "cuda" else 1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_scoring_is_in_eval_mode_and_leaves_the_networks_own(saved, data_dir, training):
    network = saved[0].train(training)
    for _ in score_pairs(network, list_pairs(data_dir / "val")[:1], CPU, FLOAT32):
        assert not network.training
    assert network.training == training


def test_an_output_that_is_not_finite_is_refused_and_the_pair_named(saved, data_dir):
    """Though the weights are finite: never a picture of clipped values, never a score."""
    network, paths = saved[0].eval(), list_pairs(data_dir / "val")
    with torch.no_grad():
        network.dec[3].weight.fill_(3e38)
    with pytest.raises(NotFinite):
        list(restore(network, torch.rand(3, 13, 8)))
    found = list(score_pairs(network, paths, CPU))
    assert all(isinstance(each, NotFinite) for each in found)
    assert str(paths[0]) in str(found[0])


def test_a_broken_pair_is_its_error_among_the_scores_of_the_others(saved, data_dir):
    paths = list_pairs(data_dir / "val")
    paths[1].write_text("no image")
    first, second, third = score_pairs(saved[0], paths, CPU)
    assert isinstance(second, DamagedFile)
    assert [pair.path for pair in (first, third)] == [paths[0], paths[2]]

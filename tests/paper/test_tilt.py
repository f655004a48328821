"""Rain that is turned, and PSNR by its angle."""

import json

import cv2
import numpy as np
import pytest
import torch

import main
import model
from base.errors import MissingFile, UserError
from cal_ssim import scores
from conftest import make_pair
from dataset import list_pairs
from paper import tables, tilt
from runs import checkpoints
from runs.checkpoints import Checkpoint
from settings import read_overrides, resolve
from synthesis.measure import angle_histogram
from synthesis.styles import STYLES


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Two small checkpoints, a data set of square pairs, one of them too small, and results in a temporary folder."""
    monkeypatch.setattr(tables, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(tilt, "PLOT", tmp_path / "tilt.png")
    monkeypatch.setattr(tilt, "SIDE", 48)
    monkeypatch.setattr(tilt, "IMAGES", 2)
    (tmp_path / "data" / "test").mkdir(parents=True)
    for index, side in enumerate((60, 40, 60, 60)):
        cv2.imwrite(str(tmp_path / "data" / "test" / f"{index}.png"), np.hstack(make_pair(side, side, index)))
    for name in ("a", "b"):
        settings = resolve("sdsen_s2", {"channel": 2, "depth": 4, "run": name, "data_dir": str(tmp_path / "data")})
        torch.manual_seed(ord(name))
        state = Checkpoint(model.build(settings).state_dict(), 7, settings)
        checkpoints.save(tmp_path / "models" / name / "best.pth", state)
    return ["--model_dir", str(tmp_path / "models"), "--device", "cpu"]


def test_the_same_rain_leans_by_the_angle():
    """Turned rain has its energy at the angle, and a quarter turn is exact."""
    style = STYLES["rain100l"]
    layers = {a: tilt.turned_rain(256, style, a, np.random.default_rng(3)) for a in (0, 30, 60, 90, -90)}
    histograms = {a: angle_histogram(np.zeros((256, 256, 3), np.uint8), cv2.merge([R] * 3)) for a, R in layers.items()}
    upright = int(histograms[0].argmax())
    for angle in (30, 60, 90):
        assert histograms[angle].argmax() == (upright + angle // 15) % 12
    assert np.abs(layers[90].astype(int) - np.rot90(layers[0], -1)).max() <= 1
    assert np.abs(layers[-90].astype(int) - np.rot90(layers[0], 1)).max() <= 1


def test_turning_does_not_change_how_strong_and_sharp_the_rain_is():
    """The mean squares of rain and of its differences, over some pictures, are the same at every angle."""
    style = STYLES["rain100l"]
    energies = {}
    for angle in (0, 15, 45, 90):
        layers = [tilt.turned_rain(512, style, angle, np.random.default_rng(i)).astype(float) for i in range(8)]
        edges = np.mean([(np.diff(R, axis=0) ** 2).mean() + (np.diff(R, axis=1) ** 2).mean() for R in layers])
        energies[angle] = np.array([np.mean(np.square(layers)), edges])
    for angle in (15, 45, 90):
        np.testing.assert_allclose(energies[angle], energies[0], rtol=0.1)


def test_pairs_are_the_middle_of_the_backgrounds_under_the_same_rain(places, tmp_path):
    paths = list_pairs(tmp_path / "data" / "test")
    both = {a: tilt.tilted_pairs([(5, paths[0])], STYLES["rain100l"], a, 0)[0] for a in (0, 90)}
    middle = cv2.imread(str(paths[0]))[6:54, 6:54]
    for O, B in both.values():
        assert (B.numpy().transpose(1, 2, 0) == middle).all()
        assert (O >= B).all()
    layers = [(O.int() - B.int()).amax(0) for O, B in both.values()]
    dark = (both[0][1] < 60).all(0) & (both[90][1] < 60).all(0)  # where nothing saturates
    assert (layers[0] != layers[1])[dark].any()
    again = tilt.tilted_pairs([(5, paths[0])], STYLES["rain100l"], 0, 0)[0]
    assert torch.equal(again[0], both[0][0])


@pytest.mark.slow
def test_tilt_writes_table_and_plot(places, tmp_path):
    main.main(["-a", "tilt", "-m", "a", "b", "--rain", "rain100l", *places])
    result = json.loads((tmp_path / "results" / "tilt.json").read_text())
    assert result["angles"] == [*range(-90, 91, 15)]
    assert (result["images"], result["rain"]) == (2, "rain100l")
    assert result["runs"]["b"] == {"steps": 7, "batch_size": 64, "data": "data", "rain": ""}
    assert list(result["psnr"]) == ["rainy input", "a", "b"]
    assert result["psnr"]["a"] != result["psnr"]["b"]
    paths = [path for path in list_pairs(tmp_path / "data" / "test") if path.stem != "1"][:2]
    pairs = tilt.tilted_pairs(list(enumerate(paths)), STYLES["rain100l"], 30, 0)
    expected = np.mean([scores(O, B)["psnr"] for O, B in pairs])
    assert result["psnr"]["rainy input"][result["angles"].index(30)] == pytest.approx(expected, abs=1e-4)
    picture = cv2.imread(str(tmp_path / "tilt.png"))
    assert picture.shape[1] > 2 * picture.shape[0]


def test_without_a_large_enough_image_nothing_is_written(places, tmp_path, monkeypatch):
    monkeypatch.setattr(tilt, "SIDE", 61)
    with pytest.raises(MissingFile):
        tilt.measure(["a"], read_overrides(places))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["-a", "tilt"],
        ["-a", "tilt", "-m", "a", "-p", "dsen"],
        ["-a", "tables", "-m", "a"],
        ["-a", "tilt", "-m", "a", "a"],
    ],
)
def test_wrong_calls(places, tmp_path, words):
    with pytest.raises(UserError):
        main.main([*words, *places])
    assert not (tmp_path / "results").exists()

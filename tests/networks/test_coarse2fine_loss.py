"""The loss of the coarse-to-fine network against its formula, with the VGG network written down."""

import pytest
import torch
import torch.nn.functional as F

import losses
from base.errors import DamagedFile, MissingFile
from by_hand import mean_absolute, mean_square, near, random_images
from conftest import VGG_CHANNELS, write_vgg
from networks.coarse2fine import Coarse2FineLoss, vgg_features
from settings import resolve


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torchvision's cache, in a temporary folder."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def vgg(tmp_path):
    """A file with random weights, and these."""
    return tmp_path / "vgg", write_vgg(tmp_path / "vgg")


def plain_features(bgr, state):
    """relu3_3 of BGR images (N, 3, H, W) in [0, 1], written down."""
    means, deviations = {"r": 0.485, "g": 0.456, "b": 0.406}, {"r": 0.229, "g": 0.224, "b": 0.225}
    planes = dict(zip("bgr", bgr.unbind(1), strict=True))
    x = torch.stack([(planes[c] - means[c]) / deviations[c] for c in "rgb"], 1)
    for index in VGG_CHANNELS:
        if index in (5, 10):  # behind a pooling
            x = torch.stack([x[..., row::2, column::2] for row in (0, 1) for column in (0, 1)]).amax(0)
        x = F.conv2d(F.pad(x, [1] * 4), state[f"features.{index}.weight"], state[f"features.{index}.bias"]).clamp(min=0)
    return x


def test_coarse2fine_by_hand(vgg):
    *rain_layers, O, B = random_images(5, 8, 12)
    criterion = losses.build(resolve("coarse2fine", {"stage_num": 2, "vgg_weights": str(vgg[0])}))
    terms = criterion(rain_layers, O, B)
    image = O - rain_layers[2]
    features = [plain_features(x, vgg[1]) for x in (image, B)]
    assert features[0].shape == (2, 256, 2, 3)
    wanted = {
        "stage_1/loss": mean_square(rain_layers[0] - (O - B)),
        "stage_2/loss": mean_square(rain_layers[1] - (O - B)),
        "l1": mean_absolute(image - B),
        "vgg": mean_absolute(features[0] - features[1]),
    }
    wanted["stage_3/loss"] = wanted["l1"] + wanted["vgg"]
    wanted["loss"] = wanted["stage_1/loss"] + wanted["stage_2/loss"] + wanted["stage_3/loss"]
    assert terms.keys() == wanted.keys()
    assert all(near(terms[name], value, 1e-4) for name, value in wanted.items())
    assert wanted["vgg"] > 0.01


def test_vgg_is_not_trained_but_passes_gradients_on(vgg):
    before = torch.get_rng_state()
    criterion = Coarse2FineLoss(True, str(vgg[0]))
    assert torch.equal(torch.get_rng_state(), before)  # the same crops and weights with it and without
    O, B = random_images(2, 8, 8)
    R = torch.zeros_like(O).requires_grad_()
    criterion([R], O, B)["vgg"].backward()
    assert R.grad.abs().max() > 0
    parameters = dict(criterion.named_parameters())
    assert len(parameters) == 2 * len(VGG_CHANNELS)
    assert all(torch.equal(parameters[name], weight) for name, weight in vgg[1].items())
    assert not any(parameter.requires_grad for parameter in parameters.values())


def test_vggs_weights_are_looked_for_in_torchvisions_cache(vgg, cache):
    O, B = random_images(2, 8, 8)
    vgg[0].rename(cache / "vgg16-397923af.pth")
    assert "vgg" in Coarse2FineLoss(True, "")([O], O, B)


def test_without_the_weights_of_vgg_there_is_no_vgg_term(cache):
    rain_layer, O, B = random_images(3, 8, 8)
    terms = Coarse2FineLoss(True, "")([rain_layer, rain_layer], O, B)
    assert terms.keys() == {"loss", "stage_1/loss", "stage_2/loss", "l1"}
    assert near(terms["stage_2/loss"], mean_absolute(O - rain_layer - B))
    assert near(terms["loss"], mean_square(rain_layer - (O - B)) + mean_absolute(O - rain_layer - B))


def test_not_refined_is_the_stages_alone(vgg):
    *rain_layers, O, B = random_images(4, 8, 8)
    criterion = losses.build(resolve("coarse2fine_no_refinement", {"stage_num": 2, "vgg_weights": str(vgg[0])}))
    terms = criterion(rain_layers, O, B)
    wanted = [mean_square(R - (O - B)) for R in rain_layers]
    assert terms.keys() == {"loss", "stage_1/loss", "stage_2/loss"}
    assert near(terms["loss"], sum(wanted))
    assert [near(terms[f"stage_{t}/loss"], value) for t, value in enumerate(wanted, 1)] == [True, True]
    assert not [*criterion.parameters()]


def test_vggs_weights_that_are_none(vgg, tmp_path):
    with pytest.raises(MissingFile):
        vgg_features(str(tmp_path / "nowhere"))
    _, state = vgg
    (tmp_path / "text").write_text("text")
    torch.save(state | {"features.7.weight": torch.zeros(128, 64, 3, 3)}, tmp_path / "shape")
    torch.save({name: value for name, value in state.items() if name != "features.14.bias"}, tmp_path / "few")
    torch.save({name.removeprefix("features."): value for name, value in state.items()}, tmp_path / "names")
    torch.save([1, 2], tmp_path / "list")
    for name in ("text", "shape", "few", "names", "list"):
        with pytest.raises(DamagedFile):
            vgg_features(str(tmp_path / name))


def test_terms_within_autocast_are_near_float32(vgg):
    """VGG computes in bfloat16, the rest does not."""
    *rain_layers, O, B = random_images(4, 16, 20)
    criterion = Coarse2FineLoss(True, str(vgg[0]))
    wanted = criterion(rain_layers, O, B)
    with torch.autocast("cpu", torch.bfloat16):
        found = criterion(rain_layers, O, B)
    for term, value in wanted.items():
        assert found[term].dtype == torch.float32
        assert near(found[term], value.item(), 0.01 if term in ("vgg", "loss", "stage_2/loss") else 1e-5)
    assert found["loss"] != wanted["loss"]

"""Each term of each loss against its formula written down in numpy, and what it does where it is not defined."""

import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses
from base.errors import UserError
from conftest import VGG_CHANNELS, write_vgg
from losses import STAGE_LOSSES, Coarse2FineLoss, StageLoss, colour_loss, lowpass, vgg_features, wants_labels
from settings import resolve


def images(count, height=12, width=13, seed=0):
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


# ---------------------------------------------------------------- of the stages one by one

BY_HAND = {
    "mse": lambda R, O, B: mean_square(R - (O - B)),
    "l1": lambda R, O, B: mean_absolute(R - (O - B)),
    "charbonnier": lambda R, O, B: charbonnier(R - (O - B), 1e-3),
    "ssim": lambda R, O, B: 1 - ssim(O - R, B),
    "ssim_l1": lambda R, O, B: 1 - ssim(O - R, B) + mean_absolute(R - (O - B)),
}


def test_every_stage_loss_has_its_formula_here():
    assert BY_HAND.keys() == STAGE_LOSSES.keys()


@pytest.mark.parametrize("last_alone", [False, True])
@pytest.mark.parametrize("name", STAGE_LOSSES)
def test_stage_losses_by_hand(name, last_alone):
    *rain_layers, O, B = images(5)
    wanted = [BY_HAND[name](R, O, B) for R in rain_layers]
    assert max(wanted) > 1.001 * min(wanted)  # no stage can stand for another
    terms = StageLoss(name, last_alone)(rain_layers, O, B)
    assert list(terms) == ["loss", "stage_1/loss", "stage_2/loss", "stage_3/loss"]
    assert all(near(terms[f"stage_{t}/loss"], value) for t, value in enumerate(wanted, 1))
    assert near(terms["loss"], wanted[-1] if last_alone else sum(wanted))


@pytest.mark.parametrize("name", STAGE_LOSSES)
def test_stage_losses_are_float32_within_autocast(name):
    """Differences of means of squares are nothing for eight bits: SSIM was a quarter off."""
    B, noise = images(2, 20, 20)
    O, criterion = B + 0.3, StageLoss(name)
    rain_layers = [0.3 + 0.01 * noise]
    wanted = criterion(rain_layers, O, B)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        found = criterion(rain_layers, O, B)["loss"]
    assert found.dtype == torch.float32
    assert near(found, wanted.item(), 1e-6)


def test_build_takes_the_settings():
    built = losses.build(resolve("sdsen", {"loss": "l1", "loss_stages": "last"}))
    assert (type(built), built.name, built.last_alone) == (StageLoss, "l1", True)
    assert not losses.build(resolve("coarse2fine", {"loss": "mse"})).last_alone


# ---------------------------------------------------------------- coarse-to-fine


@pytest.fixture
def lines(monkeypatch):
    """What is logged."""
    found = []
    monkeypatch.setattr(losses.log, "info", found.append)
    return found


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


def test_coarse2fine_by_hand(vgg, lines):
    *rain_layers, O, B = images(5, 8, 12)
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
    assert not lines


def test_vgg_is_not_trained_but_passes_gradients_on(vgg):
    before = torch.get_rng_state()
    criterion = Coarse2FineLoss(True, str(vgg[0]))
    assert torch.equal(torch.get_rng_state(), before)  # the same crops and weights with it and without
    O, B = images(2, 8, 8)
    R = torch.zeros_like(O).requires_grad_()
    criterion([R], O, B)["vgg"].backward()
    assert R.grad.abs().max() > 0
    parameters = dict(criterion.named_parameters())
    assert len(parameters) == 2 * len(VGG_CHANNELS)
    assert all(torch.equal(parameters[name], weight) for name, weight in vgg[1].items())
    assert not any(parameter.requires_grad for parameter in parameters.values())


def test_vggs_weights_are_looked_for_in_torchvisions_cache(vgg, cache, lines):
    O, B = images(2, 8, 8)
    vgg[0].rename(cache / "vgg16-397923af.pth")
    assert "vgg" in Coarse2FineLoss(True, "")([O], O, B)
    assert not lines


def test_without_vggs_weights_its_term_is_off(cache, lines):
    rain_layer, O, B = images(3, 8, 8)
    terms = Coarse2FineLoss(True, "")([rain_layer, rain_layer], O, B)
    assert terms.keys() == {"loss", "stage_1/loss", "stage_2/loss", "l1"}
    assert near(terms["stage_2/loss"], mean_absolute(O - rain_layer - B))
    assert near(terms["loss"], mean_square(rain_layer - (O - B)) + mean_absolute(O - rain_layer - B))
    (line,) = lines
    assert line.startswith(f"no weights of VGG-16 in {cache / 'vgg16-397923af.pth'}: its term of the loss is off")


def test_not_refined_is_the_stages_alone(vgg, lines):
    *rain_layers, O, B = images(4, 8, 8)
    criterion = losses.build(resolve("coarse2fine_no_refinement", {"stage_num": 2, "vgg_weights": str(vgg[0])}))
    terms = criterion(rain_layers, O, B)
    wanted = [mean_square(R - (O - B)) for R in rain_layers]
    assert terms.keys() == {"loss", "stage_1/loss", "stage_2/loss"}
    assert near(terms["loss"], sum(wanted))
    assert [near(terms[f"stage_{t}/loss"], value) for t, value in enumerate(wanted, 1)] == [True, True]
    assert not [*criterion.parameters(), *lines]


def test_vggs_weights_that_are_none(vgg, tmp_path):
    with pytest.raises(UserError, match="nowhere is missing: vgg_weights is the file of torchvision's VGG-16"):
        vgg_features(str(tmp_path / "nowhere"))
    _, state = vgg
    (tmp_path / "text").write_text("text")
    torch.save(state | {"features.7.weight": torch.zeros(128, 64, 3, 3)}, tmp_path / "shape")
    torch.save({name: value for name, value in state.items() if name != "features.14.bias"}, tmp_path / "few")
    torch.save({name.removeprefix("features."): value for name, value in state.items()}, tmp_path / "names")
    torch.save([1, 2], tmp_path / "list")
    for name in ("text", "shape", "few", "names", "list"):
        with pytest.raises(UserError, match=rf"{name} holds no features of torchvision's VGG-16 \(\w+\)$"):
            vgg_features(str(tmp_path / name))


# ---------------------------------------------------------------- intensity-aware


def blurred(batch, sigma):
    """(N, 3, H, W) through OpenCV's 9x9 Gaussian window."""
    found = [
        cv2.GaussianBlur(image.permute(1, 2, 0).numpy(), (9, 9), sigma, borderType=cv2.BORDER_REPLICATE)
        for image in batch
    ]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


def colour(x, y):
    """1 - mean cosine of the pixels; a black pixel of `y` counts as equal."""
    cosines = []
    for p, q in zip(*(image.double().permute(0, 2, 3, 1).reshape(-1, 3).numpy() for image in (x, y)), strict=True):
        cosines.append(p @ q / (np.linalg.norm(p) * np.linalg.norm(q)) if q.any() else 1.0)
    return 1 - np.mean(cosines)


def cross_entropy(logits, labels):
    """Mean over the pixels whose label is not 255."""
    found = []
    pixels = logits.double().permute(0, 2, 3, 1).reshape(-1, 19).numpy()
    for pixel, label in zip(pixels, labels.flatten().tolist(), strict=True):
        if label != 255:
            found.append(np.log(np.exp(pixel).sum()) - pixel[label])
    return np.mean(found)


def php(labelled=False, preset="php", **values):
    torch.manual_seed(0)
    return losses.build(resolve(preset, values), labelled)


def some_labels():
    """(2, 12, 13) of which about a third is ignored."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(19, (2, 12, 13), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = 255
    return labels


@pytest.mark.parametrize("sigma", [0.5, 1.7, 4.0])
@pytest.mark.parametrize("size", [(12, 13), (3, 5), (1, 1)])
def test_lowpass_is_opencvs(size, sigma):
    (B,) = images(1, *size)
    assert (lowpass(B, sigma) - blurred(B, sigma)).abs().max() < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert (lowpass(B, sigma) - blurred(B, sigma)).abs().max() < 1e-6


def test_php_by_hand():
    *rain_layers, O, B = images(4)
    labels, criterion = some_labels(), php(labelled=True)
    terms = criterion(rain_layers, O, B, labels)
    coarse, fine = (O - R for R in rain_layers)
    with torch.no_grad():
        logits = criterion.segmentation(coarse)
    wanted = {
        "stage_1/loss": charbonnier(coarse - blurred(B, 1.7), 1e-6),
        "stage_2/loss": charbonnier(fine - B, 1e-6),
        "colour": colour(coarse, B),
        "segmentation": cross_entropy(logits, labels),
    }
    factors = {"stage_1/loss": 1, "stage_2/loss": 1, "colour": 0.1, "segmentation": 0.05}
    wanted["loss"] = sum(factors[name] * value for name, value in wanted.items())
    assert terms.keys() == wanted.keys()
    assert all(near(terms[name], value) for name, value in wanted.items())
    assert abs(wanted["stage_1/loss"] - charbonnier(coarse - B, 1e-6)) > 1e-3


def test_weights_of_phps_terms():
    *rain_layers, O, B = images(4)
    terms = php(True, colour_weight=2.0, segmentation_weight=3.0)(rain_layers, O, B, some_labels())
    parts = terms["stage_1/loss"] + terms["stage_2/loss"] + 2 * terms["colour"] + 3 * terms["segmentation"]
    assert near(terms["loss"], parts.item())


@pytest.mark.parametrize(
    ("preset", "labelled", "others"),
    [("php", False, {"colour"}), ("php_acc_col", False, {"colour"}), ("php_acc", False, set())],
)
def test_terms_of_weight_zero_and_without_labels_are_left_out(preset, labelled, others):
    *rain_layers, O, B = images(4)
    criterion = php(labelled, preset)
    terms = criterion(rain_layers, O, B)
    assert terms.keys() == {"loss", "stage_1/loss", "stage_2/loss", *others}
    weighted = 0.1 * terms["colour"].item() if others else 0
    assert near(terms["loss"], (terms["stage_1/loss"] + terms["stage_2/loss"]).item() + weighted)
    assert not [*criterion.parameters()]


def test_missing_labels_are_told_where_they_are_wanted(lines):
    assert [wants_labels(resolve(name)) for name in ("php", "php_acc_col", "sdsen", "coarse2fine")] == [True] + 3 * [0]
    php(False, "php_acc_col")
    php(True)
    assert not lines
    php(False)
    assert lines == ["no folder `label` beside the training pairs: the segmentation's term of the loss is off"]


def test_without_labels_in_validation_the_segmentation_is_left_out():
    *rain_layers, O, B = images(4)
    assert "segmentation" not in php(True)(rain_layers, O, B)


def test_sigma_0_is_the_unfiltered_truth():
    *rain_layers, O, B = images(4)
    terms = php(preset="php_unfiltered")(rain_layers, O, B)
    assert near(terms["stage_1/loss"], charbonnier(O - rain_layers[0] - B, 1e-6))
    assert near(terms["stage_2/loss"], charbonnier(O - rain_layers[1] - B, 1e-6))


def test_one_sub_network_restores_the_details_too():
    R, O, B = images(3)
    terms = php(preset="php_one_network")([R], O, B)
    assert terms.keys() == {"loss", "stage_1/loss", "colour"}
    assert near(terms["stage_1/loss"], charbonnier(O - R - B, 1e-6))
    assert near(terms["colour"], colour(O - R, B))


def test_colour_of_pixels_by_hand():
    """Parallel; at a right angle; at 45 degrees, of other lengths; a black truth; a black result; both black."""
    X = torch.tensor([[0.2, 0, 0], [0, 0.5, 0], [0.3, 0.3, 0], [0.1, 0.2, 0.3], [0, 0, 0], [0, 0, 0]])
    Y = torch.tensor([[0.9, 0, 0], [0, 0, 0.1], [0.7, 0, 0], [0, 0, 0], [0.4, 0.1, 0], [0, 0, 0]])
    X, Y = (pixels.T.reshape(1, 3, 2, 3) for pixels in (X, Y))
    X = X.clone().requires_grad_()
    loss = colour_loss(X, Y)
    assert near(loss, 1 - (1 + 0 + math.sqrt(0.5) + 1 + 0 + 1) / 6)
    loss.backward()
    assert X.grad.isfinite().all()
    gradient = X.grad.reshape(3, 6).T
    assert not gradient[[3, 5]].any()  # nothing is asked of them
    assert gradient[0].abs().max() < 1e-6
    assert gradient[1, 2] < -0.1  # towards the right colour


def test_colour_of_a_black_truth_is_right_whatever_it_is():
    X = images(1)[0].requires_grad_()
    loss = colour_loss(X, torch.zeros_like(X))
    loss.backward()
    assert loss == 0
    assert torch.equal(X.grad, torch.zeros_like(X))


def test_all_pixels_ignored():
    *rain_layers, O, B = images(4)
    rain_layers = [R.requires_grad_() for R in rain_layers]
    criterion = php(True)
    terms = criterion(rain_layers, O, B, torch.full((2, 12, 13), 255))
    terms["loss"].backward()
    assert terms["segmentation"] == 0
    assert near(terms["loss"], (terms["stage_1/loss"] + terms["stage_2/loss"] + 0.1 * terms["colour"]).item())
    assert all(R.grad.isfinite().all() for R in rain_layers)
    assert all(not parameter.grad.any() for parameter in criterion.parameters())


def test_ignored_pixels_take_no_part():
    """Whatever lies under them, and the others' mean is their own."""
    *rain_layers, O, B = images(4)
    criterion, labels = php(True), some_labels()
    logits = torch.randn(2, 19, 12, 13, generator=torch.Generator().manual_seed(5))
    other = torch.where((labels == 255)[:, None], torch.full_like(logits, 50.0), logits)
    found = []
    for values in (logits, other):
        criterion.segmentation.forward = lambda X, values=values: values
        found.append(criterion(rain_layers, O, B, labels)["segmentation"].item())
    assert found[0] == found[1] == pytest.approx(cross_entropy(logits, labels), rel=1e-5)


def test_the_segmentation_is_trained_and_trains_the_first_sub_network():
    *rain_layers, O, B = images(4)
    rain_layers = [R.requires_grad_() for R in rain_layers]
    criterion = php(True, colour_weight=0.0)
    terms = criterion(rain_layers, O, B, some_labels())
    first, second = torch.autograd.grad(terms["segmentation"], rain_layers, allow_unused=True, retain_graph=True)
    assert first.abs().max() > 0
    assert second is None
    terms["segmentation"].backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in criterion.parameters())


# ---------------------------------------------------------------- both in bfloat16


@pytest.mark.parametrize("name", ["coarse2fine", "php"])
def test_terms_within_autocast_are_near_float32(name, vgg):
    """VGG and the segmentation network compute in bfloat16, the rest does not."""
    *rain_layers, O, B = images(4, 16, 20)
    criterion = php(True) if name == "php" else Coarse2FineLoss(True, str(vgg[0]))
    labels = torch.arange(19).repeat(34)[:640].view(2, 16, 20)
    wanted = criterion(rain_layers, O, B, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = criterion(rain_layers, O, B, labels)
    rough = {"vgg", "segmentation", "loss", *(["stage_2/loss"] if name == "coarse2fine" else [])}
    for term, value in wanted.items():
        assert found[term].dtype == torch.float32
        assert near(found[term], value.item(), 0.01 if term in rough else 1e-5)
    assert found["loss"] != wanted["loss"]

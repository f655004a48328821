"""Each term of the intensity-aware network's loss against its formula, and where it is not defined."""

import math

import cv2
import numpy as np
import pytest
import torch

import losses
from by_hand import charbonnier, near, random_images
from networks.php import colour_loss, lowpass
from settings import resolve


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
    (B,) = random_images(1, *size)
    assert (lowpass(B, sigma) - blurred(B, sigma)).abs().max() < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert (lowpass(B, sigma) - blurred(B, sigma)).abs().max() < 1e-6


def test_php_by_hand():
    *rain_layers, O, B = random_images(4)
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
    *rain_layers, O, B = random_images(4)
    terms = php(True, colour_weight=2.0, segmentation_weight=3.0)(rain_layers, O, B, some_labels())
    parts = terms["stage_1/loss"] + terms["stage_2/loss"] + 2 * terms["colour"] + 3 * terms["segmentation"]
    assert near(terms["loss"], parts.item())


@pytest.mark.parametrize(
    ("preset", "labelled", "others"),
    [("php", False, {"colour"}), ("php_acc_col", False, {"colour"}), ("php_acc", False, set())],
)
def test_terms_of_weight_zero_and_without_labels_are_left_out(preset, labelled, others):
    *rain_layers, O, B = random_images(4)
    criterion = php(labelled, preset)
    terms = criterion(rain_layers, O, B)
    assert terms.keys() == {"loss", "stage_1/loss", "stage_2/loss", *others}
    weighted = 0.1 * terms["colour"].item() if others else 0
    assert near(terms["loss"], (terms["stage_1/loss"] + terms["stage_2/loss"]).item() + weighted)
    assert not [*criterion.parameters()]


def test_without_labels_in_validation_the_segmentation_is_left_out():
    *rain_layers, O, B = random_images(4)
    assert "segmentation" not in php(True)(rain_layers, O, B)


def test_sigma_0_is_the_unfiltered_ground_truth():
    *rain_layers, O, B = random_images(4)
    terms = php(preset="php_unfiltered")(rain_layers, O, B)
    assert near(terms["stage_1/loss"], charbonnier(O - rain_layers[0] - B, 1e-6))
    assert near(terms["stage_2/loss"], charbonnier(O - rain_layers[1] - B, 1e-6))


def test_one_sub_network_restores_the_details_too():
    R, O, B = random_images(3)
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
    assert not gradient[[3, 5]].any()  # they have no colour
    assert gradient[0].abs().max() < 1e-6
    assert gradient[1, 2] < -0.1  # towards the right colour


def test_colour_of_a_black_truth_is_right_whatever_it_is():
    X = random_images(1)[0].requires_grad_()
    loss = colour_loss(X, torch.zeros_like(X))
    loss.backward()
    assert loss == 0
    assert torch.equal(X.grad, torch.zeros_like(X))


def test_all_pixels_ignored():
    *rain_layers, O, B = random_images(4)
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
    *rain_layers, O, B = random_images(4)
    criterion, labels = php(True), some_labels()
    logits = torch.randn(2, 19, 12, 13, generator=torch.Generator().manual_seed(5))
    other = torch.where((labels == 255)[:, None], torch.full_like(logits, 50.0), logits)
    found = []
    for values in (logits, other):
        criterion.segmentation.forward = lambda X, values=values: values
        found.append(criterion(rain_layers, O, B, labels)["segmentation"].item())
    assert found[0] == found[1] == pytest.approx(cross_entropy(logits, labels), rel=1e-5)


def test_the_segmentation_is_trained_and_trains_the_first_sub_network():
    *rain_layers, O, B = random_images(4)
    rain_layers = [R.requires_grad_() for R in rain_layers]
    criterion = php(True, colour_weight=0.0)
    terms = criterion(rain_layers, O, B, some_labels())
    first, second = torch.autograd.grad(terms["segmentation"], rain_layers, allow_unused=True, retain_graph=True)
    assert first.abs().max() > 0
    assert second is None
    terms["segmentation"].backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in criterion.parameters())


def test_terms_within_autocast_are_near_float32():
    """The segmentation network computes in bfloat16, the rest does not."""
    *rain_layers, O, B = random_images(4, 16, 20)
    criterion = php(True)
    labels = torch.arange(19).repeat(34)[:640].view(2, 16, 20)
    wanted = criterion(rain_layers, O, B, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = criterion(rain_layers, O, B, labels)
    for term, value in wanted.items():
        assert found[term].dtype == torch.float32
        assert near(found[term], value.item(), 0.01 if term in ("segmentation", "loss") else 1e-5)
    assert found["loss"] != wanted["loss"]

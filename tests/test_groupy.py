"""The group convolutions: GrouPy's outputs, equivariance, initial weights, and what they refuse."""

import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import groupy
from conftest import GOLDEN
from groupy import P4ConvP4, P4ConvZ2, P4MConvP4M, P4MConvZ2

LAYERS = [P4ConvZ2, P4ConvP4, P4MConvZ2, P4MConvP4M]
ARRAYS = np.load(GOLDEN / "groupy_layers.npz")
CASES = sorted({name.split("/")[0] for name in ARRAYS.files})


def turn(x: torch.Tensor, r: int) -> torch.Tensor:
    """A feature map (N, C, S, H, W), S = 1, 4 or 8, turned with its orientations by r quarter turns."""
    if x.shape[2] > 1:
        x = torch.cat([x[:, :, :4].roll(r, 2), x[:, :, 4:].roll(-r, 2)], 2)
    return torch.rot90(x, r, (-2, -1))


def mirror(x: torch.Tensor) -> torch.Tensor:
    return (x.roll(4, 2) if x.shape[2] == 8 else x).flip(-2)


def make(cls, *arguments, **keywords):
    torch.manual_seed(0)
    return cls(*arguments, **keywords).double()


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_groupys(case, device):
    name, *numbers = case.split("_")  # for example P4ConvP4_k5_s2_p2_b0
    kernel, stride, padding, bias = (int(number[1:]) for number in numbers)
    arrays = {key: torch.tensor(ARRAYS[f"{case}/{key}"]) for key in ("weight", "input", "output")}
    state = {"weight": arrays["weight"]} | ({"bias": torch.tensor(ARRAYS[f"{case}/bias"])} if bias else {})
    out_channels, in_channels = arrays["weight"].shape[:2]
    layer = getattr(groupy, name)(in_channels, out_channels, kernel, stride, padding, bool(bias))
    layer.load_state_dict(state)
    output = layer.to(device)(arrays["input"].to(device)).cpu()
    assert output.shape == arrays["output"].shape
    assert (output - arrays["output"]).abs().max() < 1e-5


def test_golden_covers_all_layers():
    assert {case.split("_")[0] for case in CASES} == {cls.__name__ for cls in LAYERS}


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("cls", LAYERS)
def test_equivariance(cls, kernel):
    rng = np.random.default_rng(kernel)
    height, width = rng.integers(kernel + 2, 14, 2)
    layer = make(cls, 2, 3, kernel, padding=int(rng.integers(0, 3)))
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 2, cls.in_orientations, int(height), int(width), dtype=torch.float64)
    y = layer(x)
    assert y.std() > 0.1
    for r in range(4):
        assert (layer(turn(x, r)) - turn(y, r)).abs().max() < 1e-10
        if cls.out_orientations == 8:
            assert (layer(turn(mirror(x), r)) - turn(mirror(y), r)).abs().max() < 1e-10


def test_p4_is_not_equivariant_to_mirrors():
    layer = make(P4ConvZ2, 1, 1, 3)
    x = torch.randn(1, 1, 1, 9, 9, dtype=torch.float64)
    assert (layer(mirror(x)) - mirror(layer(x))).abs().max() > 0.01


@pytest.mark.parametrize("cls", LAYERS)
def test_initial_distribution_leaves_the_orientations_out(cls):
    torch.manual_seed(0)
    layer = cls(6, 40, 5)
    bound = 1 / math.sqrt(6 * 25)
    assert layer.weight.shape == (40, 6, cls.in_orientations, 5, 5)
    assert 0.99 * bound < layer.weight.abs().max() <= bound
    assert abs(layer.weight.std().item() - bound / math.sqrt(3)) < 0.02 * bound
    assert 0.5 * bound < layer.bias.abs().max() <= bound
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert list(cls(6, 4, 5, bias=False).state_dict()) == ["weight"]


@pytest.mark.parametrize("cls", LAYERS)
def test_constant_channels_are_those_of_a_full_feature_map(cls):
    layer = make(cls, 3, 2, 3, padding=1)
    x, constant = torch.randn(2, 1, cls.in_orientations, 6, 7).double(), torch.randn(2).double()
    full = constant.view(1, 2, 1, 1, 1).expand(2, -1, cls.in_orientations, 6, 7)
    assert torch.equal(layer(x, constant=constant), layer(torch.cat([x, full], 1)))


def test_a_copy_of_the_file_works_alone(tmp_path):
    """As docs/USE.md says: outside the repository, with PyTorch alone."""
    shutil.copy(groupy.__file__, tmp_path)
    code = (
        "import groupy, torch; print(*groupy.P4ConvP4(2, 3, 5)(groupy.P4ConvZ2(3, 2, 3)(torch.ones(1, 3, 9, 9))).shape)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "3", "4", "3", "3"]


def test_gradients_after_an_evaluation():
    layer = make(P4ConvP4, 1, 1, 3)
    x = torch.randn(1, 1, 4, 5, 5, dtype=torch.float64)
    layer.eval()
    with torch.inference_mode():
        layer(x)
    layer(x).square().sum().backward()
    assert layer.weight.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("cls", "shape", "expected"),
    [
        (P4ConvZ2, (1, 3, 8, 8), r"\(N, 2, H, W\).*\(1, 3, 8, 8\)"),
        (P4ConvZ2, (1, 2, 4, 8, 8), r"\(N, 2, H, W\)"),
        (P4ConvZ2, (2, 8, 8), r"\(N, 2, H, W\)"),
        (P4ConvP4, (1, 2, 8, 8), r"\(N, 2, 4, H, W\)"),
        (P4ConvP4, (1, 2, 8, 8, 8), r"\(N, 2, 4, H, W\)"),
        (P4MConvP4M, (1, 2, 4, 8, 8), r"\(N, 2, 8, H, W\)"),
    ],
)
def test_input_that_does_not_fit(cls, shape, expected):
    with pytest.raises(ValueError, match=f"{cls.__name__}.*{expected}"):
        cls(2, 2, 3)(torch.zeros(shape))

"""The coarse-to-fine network: the paper's parameter counts and equations, outputs, and receptive field."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from model import count_parameters
from networks.coarse2fine import DCDCB, Coarse2Fine

VARIANTS = {  # the paper's tables 3 and 4: what differs, parameters, halo
    "ours": ({}, 17305, 206),
    "no_dilation": ({"dilated": False}, 17305, 74),
    "no_inner_dense": ({"inner_dense": False}, 13705, 206),
    "no_outer_dense": ({"outer_dense": False}, 16579, 206),
    "no_all_dense": ({"inner_dense": False, "outer_dense": False}, 12979, 206),
    "no_refinement": ({"refined": False}, 14486, 204),
    "single": ({"stage_num": 1, "refined": False}, 13760, 17),
}
variants = pytest.mark.parametrize("arguments", [arguments for arguments, _, _ in VARIANTS.values()], ids=VARIANTS)


def small(seed=0, **arguments):
    torch.manual_seed(seed)
    return Coarse2Fine(**{"channel": 4, "depth": 3, "stage_num": 3, **arguments}).double()


def rainy(*shape, seed=1):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts(name):
    arguments, parameters, _ = VARIANTS[name]
    assert count_parameters(Coarse2Fine(**arguments)) == parameters


@pytest.mark.parametrize("stage_num", [1, 2, 16])
def test_stages_share_all_but_the_outer_fusions(stage_num):
    fusions = sum(3 * 3 * t + 3 for t in range(2, stage_num + 1))
    assert count_parameters(Coarse2Fine(stage_num=stage_num)) == 16579 + fusions
    assert count_parameters(Coarse2Fine(stage_num=stage_num, outer_dense=False)) == 16579


@pytest.mark.parametrize(
    ("channel", "depth", "parameters"),
    [(16, 12, 55321), (32, 9, 151289)],
)
def test_wider_and_deeper_blocks(channel, depth, parameters):
    c, L = channel, depth
    block = sum(l * c * c for l in range(2, L + 1)) + L * (9 * c * c + c) + (L + 1) * c * c + c
    assert count_parameters(DCDCB(c, L, dilated=True, dense=True)) == block
    assert count_parameters(Coarse2Fine(c, L)) == parameters


# ---------------------------------------------------------------- the paper's equations


def by_hand(network, O, arguments):
    """The restored images [O_1, ..., O_T] and the refined one: equations 2 to 5 with the weights of `network`."""
    weights = network.state_dict()

    def convolve(name, x, dilation=1):
        weight = weights[f"{name}.weight"]
        around = dilation * (weight.shape[-1] // 2)
        return F.conv2d(F.pad(x, [around] * 4), weight, weights.get(f"{name}.bias"), dilation=dilation)

    def sigma(x):
        return torch.where(x > 0, x, 0.2 * x)

    def newest_first(tensors):
        return torch.cat(tensors[::-1], 1)

    images = [O]
    for t in range(1, arguments.get("stage_num", 3) + 1):
        fused = images[-1]
        if arguments.get("outer_dense", True) and t > 1:
            fused = convolve(f"fusions.{t - 1}", newest_first(images))
        z = [sigma(convolve("stage.f_st.0", fused))]
        for l in range(1, 4):
            x = z[-1]
            if arguments.get("inner_dense", True) and l > 1:
                x = convolve(f"stage.block.joins.{l - 1}", newest_first(z))
            dilation = 2 ** (l - 1) if arguments.get("dilated", True) else 1
            z.append(sigma(convolve(f"stage.block.layers.{l - 1}.0", x, dilation)))
        Y = z[-1]
        if arguments.get("inner_dense", True):
            Y = sigma(convolve("stage.block.fusion.0", newest_first(z)))
        images.append(O - convolve("stage.r_st", Y))  # O_t = O_0 - R_t: the stage's rain is the whole one
    restored = images[1:]
    if arguments.get("refined", True):
        x = sigma(convolve("refinement.0", images[-1]))
        restored.append(convolve("refinement.4", sigma(convolve("refinement.2", x))))
    return restored


@variants
def test_equations_by_hand(arguments):
    network, O = small(**arguments), rainy(2, 3, 9, 13)
    with torch.no_grad():
        rain_layers = network(O)
        for R, restored in zip(rain_layers, by_hand(network, O, arguments), strict=True):
            assert (O - R - restored).abs().max() < 1e-12
    # No two outputs are the same, so that no stage can have been left out.
    assert all((R - other).abs().max() > 1e-6 for R, other in pairwise(rain_layers))


def test_no_outer_dense_gives_a_stage_the_last_image_alone():
    network, O = small(outer_dense=False), rainy(1, 3, 10, 8)
    R1, R2, R3, _ = network(O)
    assert (network.stage(O) - R1).abs().max() < 1e-12
    assert (network.stage(O - R1) - R2).abs().max() < 1e-12
    assert (network.stage(O - R2) - R3).abs().max() < 1e-12


# ---------------------------------------------------------------- outputs


@variants
def test_any_size_and_a_gradient_for_every_parameter(arguments, device):
    torch.manual_seed(0)
    network = Coarse2Fine(**arguments).to(device)
    assert network.output_num == network.stage_num + network.refined
    O = torch.rand(2, 3, 9, 14, device=device)
    rain_layers = network(O)
    assert [R.shape for R in rain_layers] == [O.shape] * network.output_num
    sum(R.square().mean() for R in rain_layers).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())
    for height, width in ((1, 1), (1, 7), (5, 2)):
        O = torch.rand(1, 3, height, width, device=device)
        assert [R.shape for R in network(O)] == [O.shape] * network.output_num


def test_double_precision_is_the_same_function():
    torch.manual_seed(0)
    network, O = Coarse2Fine(), torch.rand(1, 3, 17, 12)
    with torch.no_grad():
        single = network(O)
        double = network.double()(O.double())
    assert all(R.dtype == torch.float64 for R in double)
    assert all((R - other).abs().max() < 1e-5 for R, other in zip(single, double, strict=True))


@pytest.mark.parametrize("refined", [True, False])
def test_fewer_outputs_are_the_first_ones(refined):
    network, O = small(refined=refined), rainy(1, 3, 8, 8)
    rain_layers = network(O)
    for count in range(1, network.output_num + 1):
        fewer = network(O, stage_num=count)
        assert len(fewer) == count
        assert all(torch.equal(R, other) for R, other in zip(fewer, rain_layers, strict=False))


def test_the_input_is_left_as_it_is():
    O = rainy(1, 3, 8, 8)
    before = O.clone()
    small()(O)
    assert torch.equal(O, before)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 4, 8, 8), (1, 3, 3, 8, 8)])
def test_images_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="shape"):
        Coarse2Fine()(torch.zeros(shape))


@pytest.mark.parametrize(("refined", "wrong"), [(True, 0), (True, -1), (True, 5), (False, 4)])
def test_numbers_of_outputs_that_there_are_not(refined, wrong):
    network = small(refined=refined)
    with pytest.raises(ValueError, match="stage_num"):
        network(rainy(1, 3, 8, 8), wrong)


# ---------------------------------------------------------------- reach


def reach(network, height, width):
    """Where in the image the middle pixel of the last output has a gradient: (H, W) bool."""
    O = rainy(1, 3, height, width).requires_grad_()
    network(O)[-1][0, :, height // 2, width // 2].sum().backward()
    return O.grad[0].abs().sum(0) > 0


@variants
@pytest.mark.parametrize(("depth", "stage_num"), [(1, 1), (2, 2), (3, 2), (2, 3)])
def test_halo_is_exact(arguments, depth, stage_num):
    network = small(**{"depth": depth, "stage_num": stage_num, **arguments})
    halo, beyond = network.halo, 3
    side = 2 * (halo + beyond) + 1
    inside = torch.zeros(side, side, dtype=torch.bool)
    inside[beyond:-beyond, beyond:-beyond] = True
    found = reach(network, side, side)
    assert not found[~inside].any()
    for edge in (found[beyond], found[-beyond - 1], found[:, beyond], found[:, -beyond - 1]):
        assert edge.any()


@pytest.mark.parametrize("name", VARIANTS)
def test_halo_of_the_papers_networks(name):
    arguments, _, halo = VARIANTS[name]
    torch.manual_seed(0)
    network = Coarse2Fine(**arguments).double()
    assert network.halo == halo
    pixels = reach(network, 1, 2 * (halo + 3) + 1)[0].nonzero()
    assert (int(pixels[0]), int(pixels[-1])) == (3, 2 * halo + 3)


def test_a_window_with_its_halo_is_enough():
    network = small(stage_num=2)
    halo, O = network.halo, rainy(1, 3, 80, 6)
    low, high = 30, 40
    with torch.no_grad():
        whole, window = network(O)[-1], network(O[:, :, low - halo : high + halo])[-1]
    assert (window[:, :, halo:-halo] - whole[:, :, low:high]).abs().max() < 1e-12

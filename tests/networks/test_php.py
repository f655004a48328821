"""PHP and Phi: the paper's counts, a plain recomputation, the variants of table IV, halo, any size, initial weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from networks.php import CLASSES, DILATIONS, PHP, Level, NonLocal, PyramidNetwork

# Table IV's networks: arguments, parameters, halo.
VARIANTS = {
    "php": ({}, 104086, 105),
    "standard": ({"block": "standard"}, 100246, 17),
    "parallel": ({"block": "parallel"}, 100246, 41),
    "hierarchical": ({"block": "hierarchical"}, 100246, 29),
    "concatenation": ({"block": "concatenation"}, 100246, 89),
    "non_local": ({"block": "non_local"}, 36226, None),
    "no_pooling": ({"pooling": "none"}, 102758, 104),
    "max_pooling": ({"pooling": "max"}, 104054, 104),
    "unrefined": ({"refined": False}, 96627, 101),
}
LOCAL = [name for name in VARIANTS if VARIANTS[name][2] is not None]
SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


def made(variant="php", seed=0, dtype=torch.float64):
    """A variant whose biases are no zeros, so that a test sees where they stand."""
    torch.manual_seed(seed)
    network = PHP(**VARIANTS[variant][0])
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return network.to(dtype)


def images(height, width, batch=1, dtype=torch.float64):
    return torch.rand(batch, 3, height, width, dtype=dtype, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_counts(variant):
    arguments, parameters, _ = VARIANTS[variant]
    assert sum(p.numel() for p in PHP(**arguments).parameters()) == parameters


def test_parameter_count_of_phi():
    assert sum(p.numel() for p in PyramidNetwork(CLASSES).parameters()) == 96899


def macs(network, height, width):
    """Multiply-accumulates of all convolutions, by the shapes that they put out; nothing is computed."""
    total = 0

    def count(convolution, _, output):
        nonlocal total
        total += output.numel() * convolution.weight[0].numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    network.to("meta")(torch.empty(1, 3, height, width, device="meta"))
    return total


def test_cost_at_512x512():
    assert macs(PHP(), 512, 512) == 9_602_334_720  # the paper's network in 9.60 GMAC
    half = 1296 + 48 * 9 * (51 + 3 * 48) + 4 * 2 * 48 * 9  # stem, four levels, T of each: at half the resolution
    full = 3 + 27 + 48 * 16 * 9 + 16 * 3 + 3 * 16 * 9 + 3 * 16 * 16 * 9 + 16 * 3  # f_d1, f_d2, head, sub-network 2
    assert macs(PHP(), 512, 512) == half * 256**2 + full * 512**2
    assert (
        macs(PHP(), 511, 512) == half * 256**2 + full * 512**2 - (432 + 6912 + 48) * 512
    )  # sub-network 2 is not padded


# ---------------------------------------------------------------- what is computed


def selu(x):
    return SELU_SCALE * torch.where(x > 0, x, SELU_ALPHA * (x.exp() - 1))


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def reweighted(f, state, T):
    t = selu(F.conv2d(f, state[f"{T}.0.weight"], state[f"{T}.0.bias"], padding=1, groups=48))
    t = selu(F.conv2d(t, state[f"{T}.2.weight"], state[f"{T}.2.bias"], padding=1, groups=48))
    return f * sigmoid(t)


def doubled_rows(x):
    """Bilinear x2 along H: a new row lies a quarter of an old one before or behind the old row's middle."""
    before, behind = torch.cat([x[:, :, :1], x[:, :, :-1]], 2), torch.cat([x[:, :, 1:], x[:, :, -1:]], 2)
    return torch.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * behind], 3).flatten(2, 3)


def plain_pyramids(Y, state, dilations=None, pooling="contrast"):
    """Sub-network 1, written down; `dilations` (level, branch) are of the levels without sums and reweighting."""
    height, width = Y.shape[-2:]
    if height % 2:
        Y = torch.cat([Y, Y[:, :, -1:]], 2)
    if width % 2:
        Y = torch.cat([Y, Y[..., -1:]], 3)
    x = selu(F.conv2d(Y, state["stem.0.weight"], state["stem.0.bias"], stride=2, padding=1))
    if pooling == "contrast":
        near = F.conv2d(Y, state["pooling.f_d1.weight"], state["pooling.f_d1.bias"])
        wide = F.conv2d(Y, state["pooling.f_d2.weight"], state["pooling.f_d2.bias"], padding=2, dilation=2)
        Y = (1 - sigmoid(near - wide)) * Y
    pairs = torch.stack([Y[..., row::2, column::2] for row in (0, 1) for column in (0, 1)])
    if pooling != "none":
        x = torch.cat([x, pairs.mean(0) if pooling == "contrast" else pairs.amax(0)], 1)
    for h in (1, 2, 3, 4):
        p = []
        for i, dilation in enumerate(dilations[h - 1] if dilations else (h, 2 * h, 3 * h, 4 * h)):
            weight, bias = (state[f"levels.{h - 1}.branches.{i}.0.{name}"] for name in ("weight", "bias"))
            c = selu(F.conv2d(x, weight, bias, padding=dilation, dilation=dilation))
            p.append(c + p[-1] if p and not dilations else c)
        f = torch.cat(p, 1)
        if not dilations:
            f = reweighted(f, state, f"levels.{h - 1}.T")
        x = f if h == 1 else x + f
    x = doubled_rows(doubled_rows(x).transpose(2, 3)).transpose(2, 3)
    x = selu(F.conv2d(x, state["head.1.weight"], state["head.1.bias"], padding=1))
    return F.conv2d(x, state["head.3.weight"], state["head.3.bias"])[..., :height, :width]


def plain_php(O, network, **options):
    """[O - X^c, O - X], written down."""
    X_c = O - plain_pyramids(O, network.pyramids.state_dict(), **options)
    state, x = network.refinement.state_dict(), X_c
    for index in (0, 2, 4, 6):
        x = selu(F.conv2d(x, state[f"{index}.weight"], state[f"{index}.bias"], padding=1))
    X = X_c + F.conv2d(x, state["8.weight"], state["8.bias"])
    return [O - X_c, O - X]


@pytest.mark.parametrize("size", [(8, 12), (9, 7), (40, 1)])
def test_plain_recomputation(size):
    network, O = made(), images(*size, batch=2)
    for R, plain in zip(network(O), plain_php(O, network), strict=True):
        assert (R - plain).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("concatenation", {"dilations": [(1, 2, 3, 4), (2, 4, 6, 8), (3, 6, 9, 12), (4, 8, 12, 16)]}),
        ("parallel", {"dilations": [(1, 2, 3, 4)] * 4}),
        ("hierarchical", {"dilations": [(1,), (2,), (3,), (4,)]}),
        ("standard", {"dilations": [(1,)] * 4}),
        ("max_pooling", {"pooling": "max"}),
        ("no_pooling", {"pooling": "none"}),
    ],
)
def test_plain_recomputation_of_the_variants(variant, options):
    network, O = made(variant), images(11, 34)
    for R, plain in zip(network(O), plain_php(O, network, **options), strict=True):
        assert (R - plain).abs().max() < 1e-12


def test_plain_recomputation_of_phi():
    torch.manual_seed(0)
    phi, X = PyramidNetwork(CLASSES).double(), images(9, 6, batch=2)
    assert (phi(X) - plain_pyramids(X, phi.state_dict())).abs().max() < 1e-12


def constant_level(biases, residual=False, **options):
    """A level whose branches put out selu(`biases`) and whose T puts out zeros, whatever they get."""
    level = Level(48, [1, 2, 3, 4], residual=residual, **options).double()
    for parameter in level.parameters():
        nn.init.zeros_(parameter)
    for branch, bias in zip(level.branches, biases, strict=True):
        nn.init.constant_(branch[0].bias, bias)
    return level


def branch_means(f):
    return f.unflatten(1, (4, 12)).mean((0, 2, 3, 4)).tolist()  # (N, 48, H, W) -> the four branches


def test_top_down_sums_go_from_small_receptive_fields_to_large_ones():
    x = torch.rand(1, 48, 5, 6, dtype=torch.float64)
    level = constant_level([1, 20, 300, 4000], aggregated=True)
    assert [branch[0].dilation for branch in level.branches] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    half = SELU_SCALE / 2  # f * sigmoid(0)
    assert branch_means(level(x)) == pytest.approx([1 * half, 21 * half, 321 * half, 4321 * half])
    level = constant_level([1, 20, 300, 4000], aggregated=False)
    assert branch_means(level(x)) == pytest.approx(
        [1 * SELU_SCALE, 20 * SELU_SCALE, 300 * SELU_SCALE, 4000 * SELU_SCALE]
    )


def test_reweighting_by_hand():
    x = torch.rand(1, 48, 5, 6, dtype=torch.float64)
    level = constant_level([2, 0, 0, 0], aggregated=True, residual=True)
    nn.init.constant_(level.T[2].bias, math.log(3) / SELU_SCALE)  # T(f) = ln 3, of which the sigmoid is 3/4
    assert (level(x) - x - 2 * SELU_SCALE * 0.75).abs().max() < 1e-12
    nn.init.constant_(level.T[2].bias, -1e9)  # SELU keeps T(f) above -1.758: no feature is shut off altogether
    assert (level(x) - x - 2 * SELU_SCALE / (1 + math.exp(SELU_SCALE * SELU_ALPHA))).abs().max() < 1e-12


def test_residuals_start_at_level_2():
    assert [level.residual for level in PHP().pyramids.levels] == [False, True, True, True]
    assert [level.residual for level in PHP(pooling="none").pyramids.levels] == [False, True, True, True]


def test_non_local_block_weighs_all_pixels_by_the_softmax_of_their_scores():
    torch.manual_seed(0)
    block, x = NonLocal(51).double(), torch.randn(2, 51, 4, 5, dtype=torch.float64)
    theta, phi, g = (f(x).flatten(2) for f in (block.theta, block.phi, block.g))  # (N, 24, H * W)
    weights = torch.einsum("nci,ncj->nij", theta, phi).softmax(2)
    y = torch.einsum("nij,ncj->nci", weights, g).unflatten(2, (4, 5))
    assert (block(x) - x - block.W(y)).abs().max() < 1e-12


def test_contrast_aware_pooling_by_hand():
    pooling = PHP().pyramids.pooling.double()
    for parameter in pooling.parameters():
        nn.init.zeros_(parameter)
    nn.init.constant_(pooling.f_d2.bias, math.log(3))  # C_a = sigmoid(-ln 3) = 1/4
    Y = images(4, 6)
    assert (pooling(Y)[0, :, 1, 2] - 0.75 * Y[0, :, 2:4, 4:6].mean((1, 2))).abs().max() < 1e-12


# ---------------------------------------------------------------- the interface of all networks


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_size(variant):
    network = made(variant, dtype=torch.float32)
    for height, width in ((1, 1), (1, 4), (2, 2), (5, 3), (6, 9), (33, 20)):
        rain_layers = network(images(height, width, batch=2, dtype=torch.float32))
        assert [R.shape for R in rain_layers] == [(2, 3, height, width)] * network.output_num
        assert all(R.isfinite().all() for R in rain_layers)


@pytest.mark.parametrize("size", [(1, 1), (7, 4), (10, 13)])
def test_logits_have_the_size_of_the_image(size):
    assert PyramidNetwork(CLASSES)(images(*size, batch=2, dtype=torch.float32)).shape == (2, 19, *size)


def test_fewer_outputs_are_the_first_ones():
    network, O = made(), images(10, 8)
    assert network.output_num == 2
    both = network(O)
    assert [torch.equal(R, other) for R, other in zip(network(O, 1), both, strict=False)] == [True]
    assert [torch.equal(R, other) for R, other in zip(network(O, 2), both, strict=True)] == [True, True]
    unrefined = PHP(refined=False).double()
    unrefined.load_state_dict(network.state_dict(), strict=False)
    assert unrefined.output_num == 1
    assert [torch.equal(R, other) for R, other in zip(unrefined(O), both, strict=False)] == [True]


@pytest.mark.parametrize("stage_num", [0, -1, 3, 1.5])
def test_outputs_that_there_are_not(stage_num):
    with pytest.raises(ValueError, match="stage_num"):
        PHP()(torch.zeros(1, 3, 4, 4), stage_num)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 4, 8, 8), (1, 1, 3, 8, 8)])
def test_images_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="shape"):
        PHP()(torch.zeros(shape))


@pytest.mark.parametrize("name", [*DILATIONS, "non_local"])
def test_unknown_parts(name):
    PyramidNetwork(3, block=name)
    with pytest.raises(KeyError):
        PyramidNetwork(3, block=name + "_")
    with pytest.raises(KeyError):
        PyramidNetwork(3, block=name, pooling="mean")


def test_dtypes():
    assert {R.dtype for R in made()(images(6, 6))} == {torch.float64}
    network, O = made(dtype=torch.float32), images(6, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        in_bf16 = network(O)
    for R, other in zip(network(O), in_bf16, strict=True):
        assert other.dtype == torch.float32
        assert 0 < (R - other).abs().mean() < 0.03 * R.std()


# ---------------------------------------------------------------- halo


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("variant", LOCAL)
def test_halo_is_how_far_a_pixel_sees(variant, axis):
    network, halo = made(variant), VARIANTS[variant][2]
    assert network.halo == halo
    middle, shape = halo + 5, [1, 3, 3, 3]
    shape[axis] = 2 * middle
    seen = []
    for pixel in (middle, middle + 1):  # an even and an odd one
        O = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        network(O)[-1].select(axis, pixel).square().sum().backward()
        rows = O.grad.abs().amax([d for d in range(4) if d != axis]).nonzero()
        seen += [pixel - rows.min().item(), rows.max().item() - pixel]
    assert max(seen) == halo


def test_non_local_blocks_see_the_whole_image():
    network, O = made("non_local"), images(60, 2).requires_grad_()
    assert network.halo is None
    network(O)[-1][:, :, 0].sum().backward()
    assert (O.grad.abs().amax((0, 1, 3)) > 0).all()


@pytest.mark.parametrize("height", [420, 421])
@pytest.mark.parametrize("variant", LOCAL)
def test_bands_are_the_image(variant, height):
    """Bands of rows, each with the halo around it, that are cut at multiples of the stride."""
    network, O = made(variant, dtype=torch.float32).eval(), images(height, 7, dtype=torch.float32)
    stride = network.stride
    assert stride == 2
    halo = math.ceil(network.halo / stride) * stride
    with torch.no_grad():
        whole = network(O)[-1]
        for start, end in ((0, 108), (108, 210), (210, 212), (212, 418), (418, height)):
            first, last = max(0, start - halo), min(height, end + halo)
            band = network(O[:, :, first:last])[-1][:, :, start - first : end - first]
            assert (band - whole[:, :, start:end]).abs().max() < 1e-5


# ---------------------------------------------------------------- the start of a training


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter(variant):
    torch.manual_seed(0)
    network = PHP(**VARIANTS[variant][0])
    sum(R.square().mean() for R in network(images(20, 18, batch=2, dtype=torch.float32))).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_gradients_of_phi_reach_every_parameter_and_the_image():
    torch.manual_seed(0)
    phi, X = PyramidNetwork(CLASSES), images(10, 12, dtype=torch.float32).requires_grad_()
    F.cross_entropy(phi(X), torch.randint(19, (1, 10, 12))).backward()
    assert all(p.grad.abs().max() > 0 for p in phi.parameters())
    assert X.grad.abs().min() > 0


def test_initial_weights_are_lecun_normal():
    torch.manual_seed(0)
    for network in (PHP(), PyramidNetwork(CLASSES), PHP("non_local")):
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = module.weight[0].numel()
                samples = module.weight.numel()
                assert module.weight.square().mean().item() * fan_in == pytest.approx(1, abs=5 * (2 / samples) ** 0.5)
                assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_activations_neither_vanish_nor_explode(variant):
    squares = []
    for seed in range(5):
        torch.manual_seed(seed)
        network, found = PHP(**VARIANTS[variant][0]), []
        for module in (network.pyramids.stem, *network.pyramids.levels, *getattr(network, "refinement", ())):
            if not isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda _, inputs, x, found=found: found.append(x.square().mean()))
        with torch.no_grad():
            rain_layers = network(torch.rand(1, 3, 64, 64))
        squares.append(torch.stack(found + [R.square().mean() for R in rain_layers]))
    means = torch.stack(squares).mean(0)  # of the seeds, for each layer
    assert means.min() > 0.2
    assert means.max() < 6

"""CUDA graphs, rehearsed on the CPU (fake_graphs.py) and run on a GPU where there is one."""

import pytest
import torch

import fake_graphs
import losses
import main
import model
from base.devices import autocast
from conftest import write_vgg
from fast import graphs
from runs.optimization import make_optimizer
from settings import resolve

CPU = torch.device("cpu")


@pytest.fixture
def recorder(device, monkeypatch):
    """On the CPU the fake in the place of PyTorch's graphs."""
    return fake_graphs.install(monkeypatch) if device.type == "cpu" else None


def settings_of(**changes):
    # Less than 8 channels: the compiled library is no operation of PyTorch, which the fake could record.
    small = {"channel": 5, "depth": 5, "stage_num": 2, "group": "z2", "batch_size": 3, "patch_size": 16}
    return resolve("sdsen_s2", {**small, **changes})


def trained(settings, device, replayed, steps=5, labelled=False):
    """Weights and the steps' results of a short training, whose third step is scored."""
    torch.manual_seed(0)
    network = model.build(settings).to(device).train()
    criterion = losses.build(settings, labelled).to(device)
    optimizer = make_optimizer(torch.nn.ModuleList([network, criterion]), 1e-3)
    generator, recorded, found = torch.Generator().manual_seed(1), None, []
    for step in range(steps):
        O, B = torch.rand(2, 3, 3, 16, 16, generator=generator).to(device)
        labels = torch.randint(0, 19, (3, 16, 16), generator=generator).to(device) if labelled else None
        if replayed and recorded is None:
            recorded = main.record_step(network, criterion, settings, O, B, labels)
            assert recorded is not None
        scored = step == 2
        found.append(main.train_step(network, optimizer, O, B, settings, scored, criterion, labels, recorded))
    return torch.cat([p.detach().flatten() for p in network.parameters()]).cpu(), found


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"precision": "float32", "clip_norm": 0.01},
        {"precision": "float32", "loss": "ssim_l1", "loss_stages": "last"},
    ],
)
def test_replayed_steps_are_the_steps(changes, device, recorder):
    settings = settings_of(**changes)
    weights, found = trained(settings, device, replayed=True)
    expected, wanted = trained(settings, device, replayed=False)
    # On the CPU the crops of a step go one after another where they are not replayed.
    tolerance = 1e-6 if changes["precision"] == "float32" else 2e-4
    assert (weights - expected).abs().max() < tolerance
    assert [row.keys() for row in found] == [row.keys() for row in wanted]
    assert len(found[2]) == 1 + 3 * 2  # loss, and of both stages loss, PSNR and SSIM
    for row, other in zip(found, wanted, strict=True):
        assert row == pytest.approx(other, rel=1e-2 if changes["precision"] == "bf16" else 1e-4)
    if recorder:
        assert [graph.replays for graph in recorder.made] == [5]


def test_labels_are_an_input_of_the_graph(device, recorder):
    settings = resolve("php", {"precision": "float32", "batch_size": 3, "patch_size": 16})
    weights, _ = trained(settings, device, replayed=True, steps=3, labelled=True)
    expected, _ = trained(settings, device, replayed=False, steps=3, labelled=True)
    assert (weights - expected).abs().max() < 1e-5


def test_features_of_vgg_are_recorded(device, recorder, tmp_path):
    write_vgg(tmp_path / "vgg.pth")
    changes = {"precision": "float32", "batch_size": 3, "patch_size": 16, "vgg_weights": str(tmp_path / "vgg.pth")}
    settings = resolve("coarse2fine_s2", changes)
    weights, found = trained(settings, device, replayed=True, steps=3)
    expected, _ = trained(settings, device, replayed=False, steps=3)
    assert "vgg" in found[2]
    assert (weights - expected).abs().max() < 1e-4


def test_a_loss_that_is_not_finite_leaves_the_weights(device, recorder):
    settings = settings_of(precision="float32")
    torch.manual_seed(0)  # with some weights, the attention's hidden units are all off, and have no gradients
    network, criterion = model.build(settings).to(device), losses.build(settings)
    optimizer = make_optimizer(network, 1e-3)
    O, B = torch.rand(2, 3, 3, 16, 16).to(device)
    recorded = main.record_step(network, criterion, settings, O, B)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    result = main.train_step(network, optimizer, O, B * torch.nan, settings, True, criterion, None, recorded)
    assert result.keys() == {"loss"}
    assert result["loss"] != result["loss"]
    assert all(torch.equal(p, old) for p, old in zip(network.parameters(), before, strict=True))
    assert main.train_step(network, optimizer, O, B, settings, True, criterion, None, recorded)["loss"] > 0
    assert not any(torch.equal(p, old) for p, old in zip(network.parameters(), before, strict=True))


def test_what_reads_from_the_gpu_is_not_recorded(device, recorder):
    assert graphs.record(lambda x: x * x.sum().item(), [torch.ones(2, device=device)]) is None
    if recorder:
        assert not recorder.made[0].started  # a recording that fails would leave PyTorch's allocator in it
    doubled = graphs.record(lambda x: x * 2, [torch.ones(2, device=device)])  # and the next one is
    assert doubled(torch.full((2,), 3.0, device=device)).tolist() == [6.0, 6.0]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_replayed_images_are_the_images(precision, device, recorder):
    torch.manual_seed(0)
    network = model.build(settings_of()).to(device).eval()
    images = [torch.rand(1, 3, *size).to(device) for size in [(9, 14)] * 5 + [(14, 9)] * 3 + [(9, 14)]]
    replays = graphs.Replays(network)
    with torch.no_grad(), autocast(precision, device):
        found = [replays(image, 2) for image in images]
        fewer = [replays(images[0], 1) for _ in range(4)]
        wanted = [network(image, 2) for image in images]
    for rain_layers, others in zip(found, wanted, strict=True):  # all are kept: none was overwritten by a later one
        for R, other in zip(rain_layers, others, strict=True):
            assert (R - other).abs().max() < (1e-5 if precision == "float32" else 1e-3)
    assert [len(rain_layers) for rain_layers in fewer] == [1] * 4
    if recorder:
        assert [graph.replays for graph in recorder.made] == [4, 1, 2]  # 5 + 1 of the first shape, less the first two


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", ["dsen", "coarse2fine_s2", "php"])
def test_replayed_images_follow_the_weights(name, precision, device, recorder):
    torch.manual_seed(0)
    network = model.build(settings_of() if name == "dsen" else name).to(device).eval()
    image, replays, stages = torch.rand(1, 3, 9, 14).to(device), graphs.Replays(network), network.output_num

    def last(function):
        with torch.no_grad(), autocast(precision, device):  # as `restore` does, for each image anew
            return function(image, stages)[-1]

    before = [last(replays) for _ in range(4)][-1]
    for parameter in network.parameters():
        parameter.data.mul_(1.5)  # which raises no version counter
    after = last(replays)
    assert (after - before).abs().max() > 1e-3
    assert (after - last(network)).abs().max() < (1e-5 if precision == "float32" else 5e-3) * after.abs().max()
    if recorder:
        assert [graph.replays for graph in recorder.made] == [3]


def test_graphs_are_for_cuda_and_end_with_their_context():
    network, cuda = model.build(settings_of()), torch.device("cuda", 0)
    with graphs.replaying(network, CPU):
        assert "at_once" not in network.__dict__
    with graphs.replaying(network, cuda):
        assert isinstance(network.at_once, graphs.Replays)
    assert "at_once" not in network.__dict__
    network.cuda_graphs = False
    with graphs.replaying(network, cuda):
        assert "at_once" not in network.__dict__


def test_memory_is_bounded_by_the_number_of_shapes(device, recorder, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_SHAPES", 2)
    calls, replays = [], None
    replays = graphs.Replays(lambda image, stage_num: calls.append(1) or [image * 2])
    for width in (5, 6, 7):
        for _ in range(4):
            (doubled,) = replays(torch.ones(1, 3, 4, width, device=device), 1)
            assert doubled.unique().tolist() == [2.0]
    per_graph = graphs.SEEN_BEFORE + graphs.WARM_UP + 1
    assert len(calls) == 2 * per_graph + 4


def test_graphs_make_room_for_an_image_that_is_too_large_beside_them(device, recorder):
    replays = None

    def doubled(image, stage_num):
        if image.shape[-1] == 9 and replays.graphs:
            raise RuntimeError("CUDA out of memory")
        return [image * 2]

    replays = graphs.Replays(doubled)
    for width in (5, 5, 5, 9, 5, 5):
        (found,) = replays(torch.ones(1, 3, 4, width, device=device), 1)
        assert found.unique().tolist() == [2.0]
        assert bool(replays.graphs) == (width == 5 and replays.max_shapes > 0 and replays.seen.total() > 2)


def test_large_images_are_not_recorded(device, recorder, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_PIXELS", 2 * 4 * 5)
    for number, recorded in ((2, True), (3, False)):
        replays = graphs.Replays(lambda image, stage_num: [image * 2])
        for _ in range(4):
            replays(torch.ones(number, 3, 4, 5, device=device), 1)
        assert bool(replays.graphs) == recorded

"""The one door for whole images: which way it chooses, golden outputs, progress, outputs that the caller owns."""

import pytest
import torch

import model
from base.devices import autocast
from fast import memory, strips, windows, winograd
from fast.any_size import rain_layers
from settings import resolve
from test_model import published

CPU = torch.device("cpu")


def make(preset="sdsen_s2", **values):
    torch.manual_seed(1)
    return model.build(resolve(preset, values)).eval()


@pytest.fixture
def ways(monkeypatch):
    """The ways that images were taken, a list that grows."""
    taken = []

    def watch(module, name):
        way = getattr(module, name)

        def watched(*arguments):
            result = way(*arguments)
            if result is not None:  # of `at_once`: the image is too large
                taken.append(name)
            return result

        monkeypatch.setattr(module, name, watched)

    watch(strips, "Strips")
    for name in ("at_once", "Windows", "through_all_stages"):
        watch(windows, name)
    return taken


@pytest.mark.skipif(winograd.library() is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("case", "way"),
    [
        ("float32", "Strips"),
        ("bf16", "at_once"),
        ("double", "at_once"),
        ("few channels", "at_once"),
        ("no library", "at_once"),
        ("no library, large", "Windows"),
        ("another network", "at_once"),
        ("another network, large", "through_all_stages"),
    ],
)
def test_the_way_of_an_image(case, way, ways, monkeypatch):
    network = make(channel=4 if case == "few channels" else 10)
    O = torch.rand(3, 40, 24)
    if case.startswith("another network"):
        network = make("coarse2fine_s2", depth=2)
    if case == "double":
        network, O = network.double(), O.double()
    if case.startswith("no library"):
        monkeypatch.setattr(winograd, "library", lambda: None)
    if case.endswith("large"):
        monkeypatch.setattr(windows, "CPU_PIXELS", 24 * 10)
    with torch.no_grad(), autocast("bf16" if case == "bf16" else "float32", CPU):
        wanted = network(O[None])
        found = list(rain_layers(network, O))
    assert ways == [way]
    for R, other in zip(found, wanted, strict=True):
        assert (R - other[0]).abs().max() < 1e-5


@pytest.mark.parametrize(("name", "stages"), [("dsen", 1), ("sdsen", 8)])
def test_published_outputs_one_stage_after_another(name, stages, device):
    network, O, expected = published(name)
    found = list(rain_layers(network.eval().to(device), O[0].to(device)))
    assert len(found) == stages
    for R, reference in zip(found, expected, strict=True):
        assert (R.cpu() - reference[0]).abs().max() < 1e-5


@pytest.mark.parametrize("compiled", [True, False])
def test_fewer_and_more_stages_than_the_networks(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(winograd, "library", lambda: None)
    network, O = make(), torch.rand(3, 20, 20)
    stages = list(rain_layers(network, O, 4))
    assert len(stages) == 4
    for count in (1, 3):
        assert torch.equal(list(rain_layers(network, O, count))[-1], stages[count - 1])


@pytest.mark.parametrize("preset", ["sdsen_s2", "coarse2fine_s2"])
@pytest.mark.parametrize("memory_gib", [0.0, 1e-6])
def test_a_rain_layer_is_the_callers_to_overwrite(memory_gib, preset):
    network, O = make(preset), torch.rand(3, 33, 12)
    wanted, before, found = network(O[None]), O.clone(), []
    for R in rain_layers(network, O, memory_gib=memory_gib):
        found.append(R.clone())
        R.fill_(7.0)
    for R, other in zip(found, wanted, strict=True):
        assert (R - other[0]).abs().max() < 1e-5
    assert torch.equal(O, before)
    assert not any(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize(("preset", "copies"), [("sdsen_s2", 4), ("coarse2fine_s2", 3 + 3)])
def test_memory_for_the_image_and_what_is_kept_of_it_is_set_aside(preset, copies, monkeypatch):
    """Of coarse2fine, whose stages see those before them, the rain layers of all three outputs."""
    left, first_rows = [], windows.first_rows
    monkeypatch.setattr(strips, "fit", lambda *_: False)
    monkeypatch.setattr(memory, "free_memory", lambda: 2.0**30)
    monkeypatch.setattr(windows, "first_rows", lambda *given: left.append(given[2].left) or first_rows(*given))
    O = torch.rand(3, 20, 20)
    list(rain_layers(make(preset), O))
    assert left == [2**30 * (1 - memory.SPARE) - copies * O.nbytes]


@pytest.mark.parametrize("library", [True, False])
def test_ticks_add_up_to_the_whole_work(library, monkeypatch):
    if not library:
        monkeypatch.setattr(winograd, "library", lambda: None)
    shares = []
    list(rain_layers(make(), torch.rand(3, 100, 30), tick=shares.append))
    assert sum(shares) == pytest.approx(1)

"""Choice of device and precision, and the errors of full memory."""

import pytest
import torch

import model
from base import devices, ranks
from base.errors import BadArgument
from runs.restore import Restoring, restore
from settings import resolve

CPU = torch.device("cpu")


def test_pick_device():
    assert devices.pick_device("cpu").type == "cpu"
    available = torch.cuda.is_available() or torch.backends.mps.is_available()
    assert (devices.pick_device("auto").type != "cpu") == available
    with pytest.raises(BadArgument):
        devices.pick_device("gpu0")
    if not torch.cuda.is_available():
        with pytest.raises(BadArgument):
            devices.pick_device("cuda")


AMPERE, TURING = (8, 0), (7, 5)


@pytest.mark.parametrize(
    ("name", "current", "index"), [("auto", 0, 0), ("cuda", 0, 0), ("cuda", 1, 1), ("cuda:1", 0, 1), ("cuda:0", 1, 0)]
)
def test_a_card_is_picked_by_its_index(cards, name, current, index):
    """The named one, or the current one; it is the current one from then on."""
    fake = cards(AMPERE, TURING)
    fake.choose(current)
    assert devices.pick_device(name) == torch.device("cuda", index)
    assert fake.current == index
    assert devices.describe(torch.device("cuda", index)) == f"Card {index}"


def test_tf32_is_off_on_a_card(cards):
    cards(AMPERE)
    assert torch.backends.cudnn.allow_tf32
    devices.pick_device("cuda")
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("names", [["cuda:2"], ["cuda:0", "cuda:7"]])
def test_an_index_out_of_range_is_refused(cards, names):
    fake = cards(AMPERE, AMPERE)
    *good, bad = names
    for name in good:
        devices.pick_device(name)
    with pytest.raises(BadArgument):
        devices.pick_device(bad)
    assert fake.current == 0


def be_rank(patch, local, here, count=None):
    """This process is number `local` of `here` on its machine, and of `count` in all."""
    patch.setattr(ranks, "count", lambda: count or here)
    patch.setenv("LOCAL_RANK", str(local))
    patch.setenv("LOCAL_WORLD_SIZE", str(here))


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize("local", [0, 1, 2])
def test_each_process_has_a_card_of_its_own(cards, monkeypatch, name, local):
    fake = cards(AMPERE, AMPERE, AMPERE)
    be_rank(monkeypatch, local, 3)
    assert devices.pick_device(name) == torch.device("cuda", local)
    assert fake.current == local


@pytest.mark.parametrize(("local", "name"), [(2, "auto"), (2, "cuda"), (0, "cuda:0"), (1, "cuda:0")])
def test_processes_that_would_share_a_card_are_refused(cards, monkeypatch, local, name):
    cards(AMPERE, AMPERE)
    be_rank(monkeypatch, local, 3)
    with pytest.raises(BadArgument):
        devices.pick_device(name)


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_one_process_a_machine_may_name_its_card(cards, monkeypatch, name, index):
    cards(AMPERE, AMPERE)
    be_rank(monkeypatch, 0, 1, count=2)
    assert devices.pick_device(name) == torch.device("cuda", index)


def test_the_cpu_is_picked_beside_a_card(cards, monkeypatch):
    """By several processes too, and without initialising CUDA."""
    cards(AMPERE)
    be_rank(monkeypatch, 1, 2)
    assert devices.pick_device("cpu") == CPU
    assert not torch.cuda.is_initialized()


GENERATIONS = {  # capability: what "auto" is in training, and for inference
    (6, 1): (torch.float32, torch.float32),  # Pascal, which computes slowly in float16
    (7, 0): (torch.float32, torch.float16),
    (7, 5): (torch.float32, torch.float16),
    (8, 0): (torch.bfloat16, torch.float16),
    (9, 0): (torch.bfloat16, torch.float16),
    (12, 0): (torch.bfloat16, torch.float16),
}


@pytest.mark.parametrize("capability", GENERATIONS)
def test_precision_by_the_cards_generation(cards, capability):
    other = (12, 0) if capability < (8, 0) else (5, 0)
    cards(other, capability)
    device = torch.device("cuda", 1)
    assert (
        tuple(devices.compute_dtype("auto", device, training) for training in (True, False)) == GENERATIONS[capability]
    )
    for training in (True, False):
        assert devices.compute_dtype("float32", device, training) == torch.float32
        assert devices.compute_dtype("bf16", device, training) == torch.bfloat16


def test_gtx_16_has_no_tensor_cores(cards):
    """Its capability is that of other Turing cards."""
    fake = cards(TURING, TURING)
    fake.cards[0].name = "NVIDIA GeForce GTX 1660 Ti"
    assert [devices.compute_dtype("auto", torch.device("cuda", index)) for index in (0, 1)] == [
        torch.float32,
        torch.float16,
    ]


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (torch.cuda.OutOfMemoryError("Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] err == 0. DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("shape mismatch"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False),
    ],
)
def test_is_out_of_memory(error, is_full):
    assert devices.is_out_of_memory(error) == is_full


def test_the_error_of_a_full_memory_here():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert devices.is_out_of_memory(error.value)


def test_compute_dtype_on_the_cpu():
    for training in (True, False):
        dtypes = [devices.compute_dtype(precision, CPU, training) for precision in ("auto", "bf16", "fp16", "float32")]
        assert dtypes == [torch.float32, torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("float32", torch.float32), ("auto", torch.float32)]
)
def test_autocast_is_the_convolutions_precision(precision, dtype):
    convolution = torch.nn.Conv2d(3, 4, 5)
    with devices.autocast(precision, CPU):
        assert convolution(torch.rand(1, 3, 9, 9)).dtype == dtype
    assert convolution.weight.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_is_not_around_who_takes_the_stages():
    network, inside = model.build(resolve("sdsen_s2", {"channel": 2, "depth": 4})).eval(), []
    network.pre_layer.register_forward_hook(lambda *_: inside.append(torch.is_autocast_enabled("cpu")))
    network.re_layer[0].register_forward_hook(lambda *_: inside.append(torch.is_autocast_enabled("cpu")))
    restored = restore(network, torch.rand(3, 20, 16), Restoring(precision="bf16"))
    assert [torch.is_autocast_enabled("cpu") for _ in restored] == [False, False]
    assert not torch.is_autocast_enabled("cpu")
    assert inside == [False, True] * 2  # the first convolution computes in float32


def test_autocast_keeps_no_copies_of_weights():
    """Fused optimizers write weights without raising their version counter: a cached copy would be stale."""
    layer, x = torch.nn.Conv2d(3, 3, 3, bias=False), torch.rand(1, 3, 8, 8)
    with devices.autocast("bf16", CPU):
        before = layer(x)
        layer.weight.data.mul_(2)
        after = layer(x)
    assert torch.equal(after, 2 * before)

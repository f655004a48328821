"""Devices, precision, and the errors of full memory."""

import pytest
import torch

import devices
import evaluate
import model
from common import UserError
from settings import resolve

CPU = torch.device("cpu")


def test_pick_device():
    assert devices.pick_device("cpu").type == "cpu"
    there = torch.cuda.is_available() or torch.backends.mps.is_available()
    assert (devices.pick_device("auto").type != "cpu") == there
    with pytest.raises(UserError, match="none of auto"):
        devices.pick_device("gpu0")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="PyTorch sees no such device here; there is"):
            devices.pick_device("cuda")


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
    restored = evaluate.restore(network, torch.rand(3, 20, 16), precision="bf16")
    assert [torch.is_autocast_enabled("cpu") for _ in restored] == [False, False]
    assert not torch.is_autocast_enabled("cpu")
    assert inside == [False, True] * 2  # the first convolution computes in float32

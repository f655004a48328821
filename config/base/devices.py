"""The device that a command runs on, the precision that it computes in, and what its full memory looks like."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from base import ranks
from base.errors import UserError

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device of a settings' `device`; "auto" is the first of cuda, mps and cpu that there is. Raises UserError.

    A CUDA device has an index, and is the process's current one from here on; of several processes on one machine, each
    gets one of its own. There float32 means float32: PyTorch's convolutions would round inputs to ten bits (TF32).
    """
    there = [kind for kind, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps)) if backend.is_available()]
    there.append("cpu")
    try:
        device = torch.device(there[0] if name == "auto" else name)
    except RuntimeError:
        raise UserError(f"device {name!r} is none of auto, cpu, mps, cuda, cuda:N") from None
    if device.type not in there:
        raise UserError(f"device {name!r}: PyTorch sees no such device here; there is {', '.join(there)}")
    if device.type != "cuda":
        return device
    index = device.index
    if ranks.local_count() > 1:
        if index is not None:
            raise UserError(f"device {name}: {ranks.local_count()} processes can't share it; --device cuda is one each")
        index = ranks.local()
    elif index is None:
        index = torch.cuda.current_device()
    if index >= torch.cuda.device_count():
        raise UserError(f"device cuda:{index}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    torch.cuda.set_device(index)
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", index)


def describe(device: torch.device) -> str:
    """The device in words: a GPU's name, or how many threads of the CPU there are."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} thread(s)" if device.type == "cpu" else device.type


def compute_dtype(precision: str, device: torch.device, training: bool = False) -> torch.dtype:
    """What convolutions compute in: a settings' `precision`, or for "auto" what the device is fast and good in.

    On CUDA GPUs with tensor cores that is float16 for inference, which is eight times as fine as bfloat16 there, and
    bfloat16 in training where there is (Ampere and newer), whose range gradients need. Elsewhere it is float32.
    """
    if precision != "auto":
        return PRECISIONS[precision]
    capability = (0, 0)
    if device.type == "cuda" and "GTX 16" not in torch.cuda.get_device_name(device):  # which has no tensor cores
        capability = torch.cuda.get_device_capability(device)
    if training:
        return torch.bfloat16 if capability >= (8, 0) else torch.float32
    return torch.float16 if capability >= (7, 0) else torch.float32


def autocast(precision: str, device: torch.device, training: bool = False) -> AbstractContextManager:
    """Within this, forward passes compute in `compute_dtype`; weights and images stay float32."""
    dtype = compute_dtype(precision, device, training)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes in where `x` lies; None where it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) else None


def without_autocast(x: Tensor) -> AbstractContextManager:
    """For the two ends of a network, few operations whose rounding to 16 bits would be more than half of the error."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether PyTorch says by this error that a device's memory is full; its errors have no class in common."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(word in str(error) for word in words)


def empty_cache(device: torch.device) -> None:
    """Give back what PyTorch keeps of a GPU's memory for later."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()

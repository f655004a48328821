"""The device and the compute precision; errors of full memory."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from base import ranks
from base.errors import BadArgument

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def available() -> list[str]:
    """The kinds of devices that PyTorch finds, the fastest first."""
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [kind for kind in kinds if kinds[kind]]


def pick_device(name: str) -> torch.device:
    """The device of setting `device`; a CUDA device becomes the current one, each process's own. Raises BadArgument."""
    kinds = available()
    try:
        device = torch.device(kinds[0] if name == "auto" else name)
    except RuntimeError:
        raise BadArgument(f"device {name!r} is not one of auto, cpu, mps, cuda, cuda:N") from None
    if device.type not in kinds:
        raise BadArgument(f"device {name!r} is not available here; PyTorch finds {', '.join(kinds)}")
    if device.type != "cuda":
        return device
    number, count = ranks.local()
    if count > 1 and device.index is not None:
        raise BadArgument(f"{count} processes can't share {name}: --device cuda gives each its own")
    index = device.index
    if index is None:
        index = number if count > 1 else torch.cuda.current_device()
    if index >= torch.cuda.device_count():
        raise BadArgument(f"cuda:{index} does not exist: PyTorch finds {torch.cuda.device_count()}, from cuda:0 on")
    torch.cuda.set_device(index)
    torch.backends.cudnn.allow_tf32 = False  # which would round the inputs of float32 convolutions to 10 bits
    return torch.device("cuda", index)


def describe(device: torch.device) -> str:
    """The device in words: the GPU's name, or the CPU and its threads."""
    words = {"cpu": f"cpu, {torch.get_num_threads()} thread(s)", "mps": "mps"}
    return words.get(device.type) or torch.cuda.get_device_name(device)


def compute_dtype(precision: str, device: torch.device, training: bool = False) -> torch.dtype:
    """The type that convolutions compute in: that of setting `precision`, or for "auto" the fastest accurate one."""
    if precision != "auto":
        return PRECISIONS[precision]
    capability = (0, 0)
    if device.type == "cuda" and "GTX 16" not in torch.cuda.get_device_name(device):  # no tensor cores
        capability = torch.cuda.get_device_capability(device)
    if training:  # gradients need the range of bfloat16
        return torch.bfloat16 if capability >= (8, 0) else torch.float32
    return torch.float16 if capability >= (7, 0) else torch.float32


def autocast(precision: str, device: torch.device, training: bool = False) -> AbstractContextManager:
    """Within this, convolutions compute in `compute_dtype`; weights and images stay float32."""
    dtype = compute_dtype(precision, device, training)
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype, cache_enabled=False)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type of autocast on the device of `x`; None if autocast is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) else None


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Turn autocast off, for the first and last layers: cheap, but more than half of the rounding error."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether this error means that memory is full: PyTorch's errors have no common class."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(word in str(error) for word in words)


def empty_cache(device: torch.device) -> None:
    """Release the GPU memory that PyTorch keeps for later."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()

"""The compiled library of winograd.cpp: built with the machine's C++ compiler at the first use, then kept on disk."""

import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from base.console import log

SOURCE = Path(__file__).with_name("winograd.cpp")
FLAGS = ("-std=gnu++17", "-O3", "-march=native", "-fPIC")
CHANNELS = 8  # the fewest of an image, so that they fill a vector; the matrices have a multiple of it
WINDOW = -2  # row and column of a tile's pixel at which its window starts


class _Images(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in "image row place tile height width channels top left".split()),
    ]


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout


def _compile(compiler: Sequence[str], file: Path) -> None:
    """Write the library `file`, all at once, so that no other process sees half of it."""
    file.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        part, whole = (str(Path(folder) / name) for name in ("winograd.o", "winograd.so"))
        # Linked without -fopenmp: PyTorch has loaded its own OpenMP, whose threads are used.
        _run(*compiler, *FLAGS, "-fopenmp", "-c", str(SOURCE), "-o", part)
        _run(*compiler, "-shared", part, "-o", whole)
        ctypes.CDLL(whole)
        os.replace(whole, file)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None, with one line in the log, where it cannot be built.

    It lies in __pycache__, one file for each source, compiler and processor. CXX names another compiler than c++.
    """
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    try:
        if platform.system() != "Linux":
            raise OSError(f"not on {platform.system()}")
        cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line for line in cpuinfo if line.lower().startswith(("flags", "features"))), "")
        words = (*compiler, *FLAGS, processor)
        parts = (SOURCE.read_bytes(), *(word.encode() for word in words), _run(*compiler, "--version"))
        key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
        file = SOURCE.parent / "__pycache__" / f"winograd-{key}.so"
        if not file.exists():
            _compile(compiler, file)
        loaded = ctypes.CDLL(str(file))
        loaded.convolve.restype = loaded.matrices_gradient.restype = None
        return loaded
    except (OSError, subprocess.SubprocessError) as error:
        log.info(f"convolutions on the CPU are slower without {SOURCE.name} compiled by {compiler[0]}: {error}")
        log.debug(getattr(error, "stderr", None))
        return None


def convolve(
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    matrices: Tensor,
    bias: Tensor | None,
    top: int = WINDOW,
    left: int = WINDOW,
) -> None:
    """Write the convolution of the images `inputs` (N, H, W, I_k), side by side in the channels, to `outputs`.

    `matrices` (64, I, O) as by `winograd.transform_filters`, `bias` (O); I and O are the channels of all inputs and all
    outputs, at least CHANNELS of each. Both sides may be bands (N, H, 4, tiles, C). The window of the outputs' first
    tile starts at the inputs' pixel (top, left). All are float32 on the CPU.
    """
    if missing := -matrices.shape[2] % CHANNELS:
        matrices, bias = (x if x is None else F.pad(x, (0, missing)) for x in (matrices, bias))
    matrices = matrices.contiguous()
    inputs = [_dense(x) for x in inputs]
    library().convolve(
        *_described(inputs, top, left),
        *_described(outputs),
        ctypes.c_int64(len(inputs[0])),
        ctypes.c_void_p(matrices.data_ptr()),
        ctypes.c_void_p(None if bias is None else bias.data_ptr()),
        ctypes.c_int64(torch.get_num_threads()),
    )


def matrices_gradient(inputs: Sequence[Tensor], gradient: Tensor) -> Tensor:
    """The gradient (64, I, O) of the matrices, from inputs (N, H, W, I_k) and the output's gradient (N, H, W, O)."""
    threads, rows, columns = torch.get_num_threads(), sum(x.shape[-1] for x in inputs), gradient.shape[-1]
    totals = torch.zeros(threads, 64, rows + -rows % CHANNELS, columns + -columns % CHANNELS)
    inputs, gradient = [_dense(x) for x in inputs], _dense(gradient)
    library().matrices_gradient(
        *_described(inputs, WINDOW, WINDOW),
        _described([gradient])[0],
        ctypes.c_int64(len(gradient)),
        ctypes.c_void_p(totals.data_ptr()),
        ctypes.c_int64(threads),
    )
    return totals.sum(0)[:, :rows, :columns]


def _described(images: Sequence[Tensor], top: int = 0, left: int = 0) -> tuple[ctypes.Array, ctypes.c_int64]:
    """Images (N, H, W, C) or bands (N, H, 4, tiles, C) as the library reads them, and their number.

    The first tile, or its window, starts at the pixel (top, left).
    """
    described = []
    for x in images:
        image, row, *inner, last = x.stride()
        place, tile = inner if len(inner) == 2 else (inner[0], 4 * inner[0])
        assert (last, len(x)) == (1, len(images[0]))
        width = math.prod(x.shape[2:-1])
        described.append(_Images(x.data_ptr(), image, row, place, tile, x.shape[1], width, x.shape[-1], top, left))
    return (_Images * len(described))(*described), ctypes.c_int64(len(described))


def _dense(x: Tensor) -> Tensor:
    """The image itself, or a copy with the channels of a pixel side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()

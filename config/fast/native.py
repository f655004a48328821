"""winograd.cpp, compiled where there is a C++ compiler: what winograd.py does in torch, several times as fast."""

import ctypes
import functools
import hashlib
import logging
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

SOURCE = Path(__file__).with_name("winograd.cpp")
FLAGS = ("-std=gnu++17", "-O3", "-march=native", "-fPIC")
FUNCTIONS = ("windows_to_values", "values_to_tiles", "multiply", "convolve", "matrices_gradient")
CHANNELS = 8  # the fewest that they take; they fill the shorter of their vectors, and matrices have a multiple of it
WINDOW = -2  # row and column of a tile's pixel at which its window begins

log = logging.getLogger(__name__)


class _Images(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in "image row place tile height width channels top left".split()),
    ]


class _Values(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in "point tile images rows columns".split()),
    ]


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout


def _compiled(compiler: Sequence[str], file: Path) -> None:
    """Makes the library `file`, all at once, so that no other process sees half of it."""
    file.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        part, whole = (str(Path(folder) / name) for name in ("winograd.o", "winograd.so"))
        # Linked without -fopenmp: its threads are those of PyTorch's OpenMP, which is loaded already.
        _run(*compiler, *FLAGS, "-fopenmp", "-c", str(SOURCE), "-o", part)
        _run(*compiler, "-shared", part, "-o", whole)
        ctypes.CDLL(whole)
        os.replace(whole, file)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code, None where it can't be had. It lies in __pycache__, one file for each source and processor.

    CXX names another compiler than c++.
    """
    if platform.system() != "Linux":
        return None
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line for line in cpuinfo if line.lower().startswith(("flags", "features"))), "")
        words = (*compiler, *FLAGS, processor)
        made_of = (SOURCE.read_bytes(), *(word.encode() for word in words), _run(*compiler, "--version"))
        key = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:16]
        file = SOURCE.parent / "__pycache__" / f"winograd-{key}.so"
        if not file.exists():
            _compiled(compiler, file)
        found = ctypes.CDLL(str(file))
        for name in FUNCTIONS:
            getattr(found, name).restype = None
        return found
    except (OSError, subprocess.SubprocessError) as error:
        log.info("no C++ compiler that works (%s): the CPU convolves more slowly; see README, Speed", compiler[0])
        log.debug("%s", getattr(error, "stderr", None) or error)
        return None


def fits(*tensors: Tensor) -> bool:
    """Whether the compiled code takes these: float32 on the CPU, with enough channels in the last dimension."""
    return all(x.shape[-1] >= CHANNELS and x.dtype == torch.float32 for x in tensors) and library() is not None


def _described(images: Sequence[Tensor], top: int = 0, left: int = 0) -> tuple[ctypes.Array, ctypes.c_int64]:
    """Images (N, H, W, C), or bands (N, H, 4, tiles, C) with the columns by their place in a tile, and their number.

    The first tile, or its window, begins at the pixel (top, left).
    """
    described = []
    for x in images:
        image, row, *inner, last = x.stride()
        place, tile = inner if len(inner) == 2 else (inner[0], 4 * inner[0])
        assert (last, len(x)) == (1, len(images[0]))
        width = math.prod(x.shape[2:-1])
        described.append(_Images(x.data_ptr(), image, row, place, tile, x.shape[1], width, x.shape[-1], top, left))
    return (_Images * len(described))(*described), ctypes.c_int64(len(described))


def run(function: str, images: Sequence[Tensor], values: Tensor, top: int, left: int) -> None:
    """windows_to_values or values_to_tiles: between the pixels of `images`, side by side in the channels, and values.

    `images`, `top` and `left` are as `_described` takes them; `values` are (8, 8, N, rows, columns, all C). Outside of
    the images there are zeros.
    """
    assert sum(x.shape[-1] for x in images) == values.shape[-1]
    getattr(library(), function)(
        *_described(images, top, left), _described_values(values), ctypes.c_int64(torch.get_num_threads())
    )


def _described_values(values: Tensor) -> ctypes.c_void_p:
    """Values (8, 8, N, rows, columns, C), or those of one image, (8, 8, rows, columns, C)."""
    *images, rows, columns, channels = values.shape[2:]
    number = math.prod(images)
    assert values.stride()[-3:] == (columns * channels, channels, 1)
    return ctypes.byref(_Values(values.data_ptr(), values.stride(1), channels, number, rows, columns))


def multiplies(matrices: Tensor) -> bool:
    """Whether `multiply` takes these matrices (64, C, O)."""
    return fits(matrices) and matrices.shape[2] % CHANNELS == 0 and matrices.is_contiguous()


def multiply(values: Tensor, matrices: Tensor, product: Tensor, add: bool) -> None:
    """What the matrices (64, C, O) make of the values (8, 8, .., C), written or added to `product` (8, 8, .., O)."""
    channels, results = matrices.shape[1:]
    library().multiply(
        _described_values(values),
        ctypes.c_int64(channels),
        ctypes.c_void_p(matrices.data_ptr()),
        _described_values(product),
        ctypes.c_int64(results),
        ctypes.c_int64(add),
        ctypes.c_int64(torch.get_num_threads()),
    )


def convolve(
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    matrices: Tensor,
    bias: Tensor | None,
    top: int = WINDOW,
    left: int = WINDOW,
) -> None:
    """Writes the convolution of the images `inputs` (N, H, W, I), side by side in the channels, to `outputs`.

    `matrices` are (64, I, O), `bias` (O), as `winograd.transform_filters` makes them, O the channels of all outputs.
    Both sides may be bands, as `_described` takes them; the window of the outputs' first tile begins at the inputs'
    pixel (top, left).
    """
    if short := -matrices.shape[2] % CHANNELS:
        matrices, bias = (x if x is None else F.pad(x, (0, short)) for x in (matrices, bias))
    matrices = matrices.contiguous()
    inputs = [_channels_last(x) for x in inputs]
    library().convolve(
        *_described(inputs, top, left),
        *_described(outputs),
        ctypes.c_int64(len(inputs[0])),
        ctypes.c_void_p(matrices.data_ptr()),
        ctypes.c_void_p(None if bias is None else bias.data_ptr()),
        ctypes.c_int64(torch.get_num_threads()),
    )


def matrices_gradient(inputs: Sequence[Tensor], gradient: Tensor) -> Tensor:
    """The gradient (64, I, O) of the matrices, from the inputs (N, H, W, I) and the output's gradient (N, H, W, O)."""
    threads, rows, columns = torch.get_num_threads(), sum(x.shape[-1] for x in inputs), gradient.shape[-1]
    totals = torch.zeros(threads, 64, rows + -rows % CHANNELS, columns + -columns % CHANNELS)
    inputs, gradient = [_channels_last(x) for x in inputs], _channels_last(gradient)
    library().matrices_gradient(
        *_described(inputs, WINDOW, WINDOW),
        _described([gradient])[0],
        ctypes.c_int64(len(gradient)),
        ctypes.c_void_p(totals.data_ptr()),
        ctypes.c_int64(threads),
    )
    return totals.sum(0)[:, :rows, :columns]


def _channels_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()

"""winograd.cpp, compiled where there is a C++ compiler: the sums of winograd.py, several times as fast."""

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
from torch import Tensor

SOURCE = Path(__file__).with_name("winograd.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC")
FUNCTIONS = ("windows_to_values", "tiles_to_values", "values_to_tiles")  # the last one takes one image
CHANNELS = 8  # the fewest that they take: the shorter of their vectors

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
        made_of = (SOURCE.read_bytes(), *(x.encode() for x in (*FLAGS, processor)), _run(*compiler, "--version"))
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


def run(function: str, images: Sequence[Tensor], values: Tensor, top: int, left: int) -> None:
    """One of FUNCTIONS between the pixels of `images`, side by side in the channels, and their values.

    `images` are (N, H, W, C), or bands (N, H, 4, tiles, C) with the columns by their place in a tile; `values` are
    (8, 8, N, rows, columns, all C). The tile (or the window) of row 0 and column 0 begins at the pixel (top, left).
    Outside of the images there are zeros.
    """
    _, _, number, rows, columns, channels = values.shape
    assert values.stride()[2:] == (rows * columns * channels, columns * channels, channels, 1)
    described = []
    for x in images:
        image, row, *inner, last = x.stride()
        place, tile = inner if len(inner) == 2 else (inner[0], 4 * inner[0])
        assert (len(x), last) == (number, 1)
        width = math.prod(x.shape[2:-1])
        described.append(_Images(x.data_ptr(), image, row, place, tile, x.shape[1], width, x.shape[-1], top, left))
    assert sum(x.shape[-1] for x in images) == channels
    getattr(library(), function)(
        (_Images * len(described))(*described),
        ctypes.c_int64(len(described)),
        ctypes.byref(_Values(values.data_ptr(), values.stride(1), channels, number, rows, columns)),
        ctypes.c_int64(torch.get_num_threads()),
    )

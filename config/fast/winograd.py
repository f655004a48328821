"""5x5 convolution on the CPU with 6.25 times fewer multiplications: Winograd's minimal filtering F(4x4, 5x5).

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016. A convolution in one dimension is a
product of polynomials, which its values at enough points determine: eight points for five filter taps and four outputs.
So a tile of 4x4 outputs needs an 8x8 window of the input. Sums take the window to its values at the 64 pairs of points,
64 matrix products over the channels apply the filters, and sums lead back to the tile. winograd.cpp does all this; the
machine's C++ compiler builds it at the first use (`library`).

A band is the memory layout that strips.py keeps image rows in: (rows, 4, tiles + 2, C), that is, place within the tile,
tile, channel, with a tile of zeros at either end.
"""

import ctypes
import functools
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from base import ranks
from base.console import log

SOURCE = Path(__file__).with_name("winograd.cpp")
FLAGS = ("-std=gnu++17", "-O3", "-march=native", "-fPIC")
CHANNELS = 8  # the fewest of an image, so that they fill a vector; the matrices have a multiple of it
WINDOW = (-2, -2)  # row and column of a tile's pixel at which its window starts
TILE = 4  # outputs of one tile in each dimension
KERNEL = 5
HALO = KERNEL // 2  # pixels to each side of one that its output depends on

# Filter taps to their values at the points 0, 1, -1, 2, -2, 1/2, -1/2 and infinity, each divided by a factor that
# `to_points` in winograd.cpp leaves out.
_SCALES = (1, -4.5, -4.5, 360, 360, 1.40625, 1.40625)
_POINTS = zip((0, 1, -1, 2, -2, 0.5, -0.5), _SCALES, strict=True)
_ROWS = [[p**k / scale for k in range(KERNEL)] for p, scale in _POINTS]
_FILTER = torch.tensor([*_ROWS, [0, 0, 0, 0, 1]], dtype=torch.float64)


class _Images(ctypes.Structure):
    NUMBERS = "image row place tile height width channels top left".split()
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in NUMBERS)]


_IMAGES, _INT, _MEMORY = ctypes.POINTER(_Images), ctypes.c_int64, ctypes.c_void_p  # types of arguments


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout


def _compile(compiler: Sequence[str], file: Path) -> None:
    """Write the library `file`, all at once, so that no other process sees half of it."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        part, whole = (str(Path(folder) / name) for name in ("winograd.o", "winograd.so"))
        # Linked without -fopenmp: PyTorch has loaded its own OpenMP, whose threads are used.
        _run(*compiler, *FLAGS, "-fopenmp", "-c", str(SOURCE), "-o", part)
        _run(*compiler, "-shared", part, "-o", whole)
        ctypes.CDLL(whole)
        os.replace(whole, file)


def _folders() -> Iterator[Path]:
    """Where the library may be kept: beside the source, in the user's cache, or until the process ends."""
    yield SOURCE.parent / "__pycache__"
    cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if os.path.isabs(cache):
        yield Path(cache, "sdsen")
    with tempfile.TemporaryDirectory(prefix="sdsen-") as folder:  # a loaded library needs no file any more
        yield Path(folder)


def _check_owner(folder: Path) -> None:
    """Raise OSError if somebody could put a library into `folder` who can't change the source either."""
    status, source = folder.stat(), SOURCE.parent.stat()
    if status.st_uid not in (os.getuid(), source.st_uid, 0) or status.st_mode & 0o022 & ~source.st_mode:
        raise OSError(f"{folder} can be written by others")


def _find_or_compile(compiler: Sequence[str]) -> ctypes.CDLL:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line for line in cpuinfo if line.lower().startswith(("flags", "features"))), "")
    words = "\0".join((*compiler, *FLAGS, processor)).encode()
    key = hashlib.sha256(SOURCE.read_bytes() + words + _run(*compiler, "--version")).hexdigest()[:16]
    failed = []
    for folder in _folders():
        file = folder / f"winograd-{key}.so"
        try:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            _check_owner(folder)
            if not file.exists():
                _compile(compiler, file)
            return ctypes.CDLL(str(file))
        except OSError as error:  # not writable, or its file system runs no programs
            failed.append(str(error))
    raise OSError("; ".join(failed))


def _reason(error: Exception, compiler: Sequence[str]) -> str:
    """Why there is no library, in one line."""
    if shutil.which(compiler[0]) is None:
        return f"there is no C++ compiler {compiler[0]}: install one (apt install g++), or name one with CXX"
    lines = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
    return next((line for line in lines if "error" in line), lines[-1] if lines else str(error))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library that compiler CXX (default: c++) makes of the source, kept in one of `_folders`.

    None, with a warning, where that fails.
    """
    compiler = os.environ.get("CXX", "").split() or ["c++"]
    try:
        if platform.system() != "Linux":
            raise OSError(f"not on {platform.system()}")
        loaded = _find_or_compile(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        say = log.warning if ranks.is_first() else log.debug
        say(f"warning: convolutions on the CPU are slower without compiled {SOURCE.name}: {_reason(error, compiler)}")
        return None
    loaded.convolve.argtypes = [_IMAGES, _INT, _IMAGES, _INT, _INT, _MEMORY, _MEMORY, _INT]
    loaded.matrices_gradient.argtypes = [_IMAGES, _INT, _IMAGES, _INT, _MEMORY, _INT]
    return loaded


def convolve(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], matrices: Tensor, bias: Tensor | None, start: tuple = WINDOW
) -> None:
    """Write the convolution of the images `inputs` (N, H, W, I_k), side by side in the channels, to `outputs`.

    `matrices` (64, I, O) as by `transform_filters`, `bias` (O); I and O are the channels of all inputs and all outputs,
    at least CHANNELS of each. Both sides may be bands (N, H, 4, tiles, C). The window of the outputs' first tile starts
    at the inputs' pixel `start`. All are float32 on the CPU.
    """
    if missing := -matrices.shape[2] % CHANNELS:
        matrices, bias = (x if x is None else F.pad(x, (0, missing)) for x in (matrices, bias))
    matrices = matrices.contiguous()
    inputs = [_dense(x) for x in inputs]
    images = (_described(inputs, start), len(inputs), _described(outputs), len(outputs), len(inputs[0]))
    addresses = (matrices.data_ptr(), None if bias is None else bias.data_ptr())
    library().convolve(*images, *addresses, torch.get_num_threads())


def matrices_gradient(inputs: Sequence[Tensor], gradient: Tensor) -> Tensor:
    """The gradient (64, I, O) of the matrices, from inputs (N, H, W, I_k) and the output's gradient (N, H, W, O)."""
    threads, rows, columns = torch.get_num_threads(), sum(x.shape[-1] for x in inputs), gradient.shape[-1]
    totals = torch.zeros(threads, 64, rows + -rows % CHANNELS, columns + -columns % CHANNELS)
    inputs, gradient = [_dense(x) for x in inputs], _dense(gradient)
    images = (_described(inputs, WINDOW), len(inputs), _described([gradient]), len(gradient))
    library().matrices_gradient(*images, totals.data_ptr(), threads)
    return totals.sum(0)[:, :rows, :columns]


def _described(images: Sequence[Tensor], start: tuple[int, int] = (0, 0)) -> ctypes.Array:
    """Images (N, H, W, C) or bands (N, H, 4, tiles, C) as the library reads them, from the pixel `start` on."""
    described = []
    for x in images:
        image, row, *inner, last = x.stride()
        place, tile = inner if len(inner) == 2 else (inner[0], 4 * inner[0])
        assert (last, len(x)) == (1, len(images[0]))
        width = math.prod(x.shape[2:-1])
        described.append(_Images(x.data_ptr(), image, row, place, tile, x.shape[1], width, x.shape[-1], *start))
    return (_Images * len(described))(*described)


def _dense(x: Tensor) -> Tensor:
    """The image itself, or a copy with the channels of a pixel side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def transform_filters(filters: Tensor) -> Tensor:
    """Filters (O, I, 5, 5) as the matrices (64, I, O) that the windows' values are multiplied with."""
    points = _FILTER.to(filters.device)
    values = points @ filters.double() @ points.T  # (O, I, 8, 8)
    return values.permute(2, 3, 1, 0).flatten(0, 1).to(torch.float32).contiguous()  # (64, I, O)


def tiles(length: int) -> int:
    return -(-length // TILE)


def to_band(image: Tensor, band: Tensor) -> None:
    """Write an image (H, W, C) into the first rows of a band of zeros."""
    for place in range(TILE):
        columns = image[:, place::TILE]
        band[: len(image), place, 1 : 1 + columns.shape[1]] = columns


def from_band(rows: Tensor, image: Tensor) -> None:
    """Write the rows (H', 4, tiles, C) of a band, without the zeros at its ends, to an image (H, W, C), H <= H'."""
    for place in range(TILE):
        columns = image[:, place::TILE]
        columns.copy_(rows[: len(image), place, : columns.shape[1]])


def convolve_bands(bands: Sequence[Tensor], matrices: Tensor, bias: Tensor, out: Tensor) -> None:
    """Convolve bands (rows + 4, 4, tiles + 2, I_k), side by side in the channels, each with its halo, into `out`.

    This is the inner part (rows, 4, tiles, O) of a band, or an image (H, W, O) with H <= rows.
    """
    convolve([band[None] for band in bands], [out[None]], matrices, bias, (0, TILE - HALO))


class Convolution(torch.autograd.Function):
    """Convolution of the images `inputs`, side by side in the channels; the input's gradient is a convolution again."""

    @staticmethod
    def forward(
        transposed: Callable[[], Tensor], matrices: Tensor, weight: Tensor, bias: Tensor | None, *inputs: Tensor
    ) -> Tensor:
        """Of inputs (N, I_k, H, W); `matrices` (64, I, O) and `transposed()` (64, O, I) are those of `weight`."""
        return _convolve(inputs, matrices, bias, [len(weight)])[0]

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.transposed, _, weight, _, *images = inputs
        ctx.save_for_backward(weight, *images)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        weight, *inputs = ctx.saved_tensors
        _, needs_matrices, needs_weight, needs_bias, *needs_inputs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # for second-order gradients
            needs = [any(needs_inputs), needs_weight, needs_bias]
            d_inputs, d_weight, d_bias = convolution_backward(gradient, inputs, weight, needs)
            return None, None, d_weight, d_bias, *d_inputs
        d_inputs: Sequence[Tensor | None] = [None] * len(inputs)
        d_matrices = d_bias = None
        if any(needs_inputs):
            d_inputs = _convolve([gradient], ctx.transposed(), None, [x.shape[1] for x in inputs])
        if needs_matrices:
            d_matrices = matrices_gradient(_channels_last(inputs), *_channels_last([gradient]))
        if needs_bias:
            d_bias = gradient.sum((0, 2, 3))
        return None, d_matrices, None, d_bias, *d_inputs


def convolution_backward(
    gradient: Tensor, inputs: Sequence[Tensor], weight: Tensor, needs: list[bool]
) -> tuple[Sequence[Tensor | None], Tensor | None, Tensor | None]:
    """PyTorch's gradients of 5x5 filters `weight` (O, I, 5, 5): of all inputs, the filters and the bias, as `needs`."""
    sizes = ([1, 1], [HALO, HALO], [1, 1], False, [0, 0], 1)
    d_images, d_weight, d_bias = torch.ops.aten.convolution_backward(
        gradient, side_by_side(inputs), weight, [len(weight)], *sizes, needs
    )
    d_inputs = [None] * len(inputs) if d_images is None else d_images.split([x.shape[1] for x in inputs], 1)
    return d_inputs, d_weight, d_bias


def side_by_side(images: Sequence[Tensor]) -> Tensor:
    """Images (N, C_k, H, W) joined in the channels; channels-last, if they are, which cat would not see for N = 1."""
    if len(images) == 1:
        return images[0]
    return torch.cat([x.permute(0, 2, 3, 1) for x in images], 3).permute(0, 3, 1, 2)


def _convolve(inputs: Sequence[Tensor], matrices: Tensor, bias: Tensor | None, channels: Sequence[int]) -> list[Tensor]:
    """Images (N, I_k, H, W) to images (N, C, H, W) in channels-last memory, of so many channels each."""
    number, _, height, width = inputs[0].shape
    outputs = [torch.empty(number, count, height, width, memory_format=torch.channels_last) for count in channels]
    convolve(_channels_last(inputs), _channels_last(outputs), matrices, bias)
    return outputs


def _channels_last(images: Sequence[Tensor]) -> list[Tensor]:
    return [x.permute(0, 2, 3, 1) for x in images]

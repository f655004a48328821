"""What was tried to make a 5x5 convolution of p4 feature maps faster on the CPU, one beside the other.

    python bench/ideas.py

One layer of S-DSEN, 80 to 40 planes, on a strip of 64 rows of 481 pixels. Each idea is timed in turn with the direct
convolution in channels-last memory, and compared with the same in float64. bench/NOTES.md holds what came of it.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "config"))

import native
import winograd
from convolution import Filters, conv2d, shared_filters
from groupy import P4ConvP4

REPEATS = 9


def irreducible(layer: P4ConvP4) -> Callable[[Tensor], Tensor]:
    """The exact block form: a change of basis after which the filter bank has 6/16 of its entries.

    The 25 taps, four orientations of the input form orbits of four under a quarter turn (of tap and orientation
    together). The Fourier transform over each orbit, and over the orientations of the output, leaves a block for the
    trivial representation, one for the sign, and one of complex numbers: 1 + 1 + 4 of 16 parts.
    """
    filters, _ = layer.make_filters()
    outputs, inputs = filters.shape[0] // 4, filters.shape[1] // 4
    taps = torch.arange(25).view(5, 5)
    turn = torch.rot90(taps).flatten().argsort()  # where a quarter turn takes each tap
    orbits = []
    seen = set()
    for tap in range(25):
        for s in range(4):
            orbit, place = [], (tap, s)
            while place not in orbit:
                orbit.append(place)
                place = (int(turn[place[0]]), (place[1] + 1) % 4)
            if not seen & set(orbit):
                seen |= set(orbit)
                orbits.append(orbit)
    order = torch.tensor([[s * 25 + tap for tap, s in orbit] for orbit in orbits])  # (orbits, 4) into (4, 25)
    columns = filters.view(outputs, 4, inputs, 4 * 25)[..., order]  # (O, 4, I, orbits, 4)
    spectrum = torch.fft.fft(torch.fft.ifft(columns.double(), dim=1), dim=-1)
    blocks = [spectrum[:, k, ..., k].flatten(1).mT / 4 for k in range(4)]  # (I * orbits, O); the rest is zero
    assert 4 * sum(block.abs().sum() for block in blocks) > (1 - 1e-6) * spectrum.abs().sum()
    trivial, sign = (blocks[k].real.float() for k in (0, 2))
    pair = torch.cat([torch.cat([blocks[1].real, blocks[1].imag], 1), torch.cat([-blocks[1].imag, blocks[1].real], 1)])
    pair = pair.float()

    def convolve(x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        windows = F.unfold(x, 5, padding=2)[0].view(inputs, 4 * 25, height * width)[:, order]  # (I, orbits, 4, pixels)
        a, b, c, d = windows.unbind(2)
        even, odd = a + c, b + d
        parts = [(even + odd).flatten(0, 1), (even - odd).flatten(0, 1)]
        complex_part = torch.cat([(a - c).flatten(0, 1), (b - d).flatten(0, 1)])
        y0, y2 = trivial.mT @ parts[0], sign.mT @ parts[1]
        y1 = (pair.mT @ complex_part).view(2, outputs, -1)
        y = torch.stack([y0 + y2 + 2 * y1[0], y0 - y2 + 2 * y1[1], y0 + y2 - 2 * y1[0], y0 - y2 - 2 * y1[1]], 1)
        return y.view(1, outputs * 4, height, width)

    return convolve


def ideas(layer: P4ConvP4) -> dict[str, Callable[[Tensor], Tensor]]:
    """Each idea as a function of x (1, 80, H, W) in channels-last memory."""
    filters = layer.make_filters()[0].detach()
    last = filters.contiguous(memory_format=torch.channels_last)
    kept = Filters(filters, None)
    halves = [half.contiguous(memory_format=torch.channels_last) for half in filters.split(40, 1)]
    padded = F.pad(filters, (0, 0, 0, 0, 0, 0, 0, 8)).contiguous(memory_format=torch.channels_last)
    blocks = irreducible(layer)

    def plain(x: Tensor) -> Tensor:
        return F.conv2d(x, last, padding=2)

    def made_each_time(x: Tensor) -> Tensor:
        return F.conv2d(x, layer.make_filters()[0], padding=2)

    def strips(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 2, 2))
        parts = [F.conv2d(x[:, :, top : top + 12], last, padding=(0, 2)) for top in range(0, x.shape[2] - 4, 8)]
        return torch.cat(parts, 2)

    def two_that_add(x: Tensor) -> Tensor:
        return F.conv2d(x[:, :40], halves[0], padding=2).add_(F.conv2d(x[:, 40:], halves[1], padding=2))

    def bfloat16(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(x)

    def compiled(x: Tensor) -> Tensor:
        with shared_filters():
            return conv2d([x], kept)

    def in_torch(chunk: int) -> Callable[[Tensor], Tensor]:
        def convolve(x: Tensor) -> Tensor:
            with mock.patch.object(winograd, "CHUNK", chunk), mock.patch.object(native, "library", return_value=None):
                return compiled(x)

        return convolve

    found = {
        "direct, channels-last": plain,
        "direct, NCHW": lambda x: F.conv2d(x.contiguous(), filters, padding=2),
        "direct, filters made in each call": made_each_time,
        "direct, strips of 8 rows": strips,
        "direct, as two that add": two_that_add,
        "direct, 40 results padded to 48": lambda x: F.conv2d(x, padded, padding=2)[:, :40],
        "direct, torch.compile": torch.compile(plain, dynamic=False),
        "direct, bfloat16": bfloat16,
        "irreducible blocks (6/16)": blocks,
    }
    if native.library():
        found["Winograd, compiled"] = compiled
    for chunk in (64, 128, 256, 512, 1024, 4096):
        found[f"Winograd, {chunk} tiles, in torch"] = in_torch(chunk)
    return found


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    rows, width = 64, 481
    x = torch.randn(1, 80, rows, width).contiguous(memory_format=torch.channels_last)
    layer = P4ConvP4(20, 10, 5, padding=2, bias=False)
    functions = ideas(layer)
    plain = functions["direct, channels-last"]
    exact = F.conv2d(x.double(), layer.make_filters()[0].double(), padding=2)
    print(f"{'':36}{'ratio':>8}{'us a pixel':>12}{'error':>10}   (ratio: time of the first line over this one's)")
    for name, function in functions.items():
        try:
            error = (function(x) - exact).abs().max().item()
        except Exception as problem:  # torch.compile needs a C++ compiler
            print(f"{name:36}  not possible here: {type(problem).__name__}")
            continue
        plain(x)
        times, base = [], []
        for _ in range(REPEATS):
            for run, seconds in ((plain, base), (function, times)):
                started = time.perf_counter()
                run(x)
                seconds.append(time.perf_counter() - started)
        median = statistics.median(times)
        ratio = statistics.median(base) / median
        print(f"{name:36}{ratio:8.2f}{median / rows / width * 1e6:12.3f}{error:10.1e}")


if __name__ == "__main__":
    main()

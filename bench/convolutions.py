"""The rates of single 5x5 convolutions in 16 bits, channels-last, with inputs and outputs padded to other numbers.

A padded convolution computes more, and may still be faster: the kernels for tensor cores take channels in groups.
`python bench/bench.py --only convolutions` prints the table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from timing import Numbers, alternate, summary

KERNEL, HALO = 5, 2
Channels = tuple[int, int]  # inputs, outputs

# The networks' convolutions, and what they may be padded to; the first candidate is the convolution itself.
CANDIDATES: dict[Channels, tuple[Channels, ...]] = {
    (80, 40): ((80, 40), (80, 48), (80, 64), (96, 48), (128, 64)),
    (40, 40): ((40, 40), (40, 48), (40, 64), (48, 48), (64, 64)),
    (40, 80): ((40, 80), (40, 96), (40, 128), (48, 96), (64, 128)),
    (40, 10): ((40, 10), (40, 16), (40, 32), (40, 64), (48, 16), (64, 16), (64, 64)),
    (40, 20): ((40, 20), (40, 24), (40, 32), (40, 64), (48, 24), (64, 32)),
    (20, 20): ((20, 20), (20, 24), (20, 32), (20, 64), (24, 24), (32, 32), (64, 64)),
    (64, 64): ((64, 64),),
}
CALLS = 10  # in a row in one timing, so that a GPU has the next one waiting
REPEATS = 7


@dataclass(frozen=True)
class Use:
    """What a convolution is timed in: a type, a size (N, H, W), and whether its gradients are computed too."""

    dtype: torch.dtype
    size: tuple[int, int, int]
    backward: bool = False


def uses(batch: int, patch: int, image: tuple[int, int]) -> dict[str, Use]:
    """The uses of a table: both halves of a training step in bf16, and one image in fp16."""
    crops = (batch, patch, patch)
    return {
        "bf16, forward": Use(torch.bfloat16, crops),
        "bf16, and backward": Use(torch.bfloat16, crops, backward=True),
        "fp16, one image": Use(torch.float16, (1, *image)),
    }


def make(channels: Channels, use: Use, device: torch.device) -> Callable:
    """A function that convolves once, and with `use.backward` computes the gradients of inputs, filters and bias."""

    def random(*shape: int) -> torch.Tensor:
        x = torch.rand(shape, dtype=use.dtype, device=device)
        x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        return x.requires_grad_(use.backward)

    inputs, outputs = channels
    number, height, width = use.size
    x, filters, bias = random(number, inputs, height, width), random(outputs, inputs, KERNEL, KERNEL), random(outputs)
    gradient = random(number, outputs, height, width).detach()

    def run() -> tuple[torch.Tensor, ...]:
        y = F.conv2d(x, filters, bias, padding=HALO)
        return torch.autograd.grad(y, (x, filters, bias), gradient) if use.backward else (y,)

    return run


def nominal_flop(channels: Channels, use: Use) -> float:
    """Two for each multiplication of the convolution; its gradients are two convolutions more."""
    number, height, width = use.size
    inputs, outputs = channels
    return (6 if use.backward else 2) * KERNEL**2 * inputs * outputs * number * height * width


def measure(
    device: torch.device, named: dict[str, Use], repeats: int | None = None, candidates: dict = CANDIDATES
) -> list[Numbers]:
    """Of each candidate, in each use, seconds of a call and the unpadded convolution's nominal TFLOP/s."""
    rows = []
    for channels, padded in candidates.items():
        group = [{"channels": channels, "padded": pair} for pair in padded]
        for name, use in named.items():
            runs = {pair: partial(_calls, make(pair, use, device)) for pair in padded}
            alternate(runs, device, 1, 0)
            seconds = alternate(runs, device, repeats or REPEATS, 0)
            for row in group:
                each = summary([s / CALLS for s in seconds[row["padded"]]])
                row[name] = {**each, "tflops": 1e-12 * nominal_flop(channels, use) / each["median"]}
        rows += group
    return rows


def _calls(run: Callable) -> None:
    for _ in range(CALLS):
        run()


def table_rows(numbers: list[Numbers], named: dict[str, Use]) -> list[list[str]]:
    """The rows of `measure`: in each use ms, TFLOP/s, and how many times faster than the unpadded convolution."""
    rows, plain = [], {}
    for row in numbers:
        if row["channels"] == row["padded"]:
            plain = row
        cells = [
            f"{1000 * row[name]['median']:.3f} {row[name]['tflops']:5.0f} "
            f"({plain[name]['median'] / row[name]['median']:.2f})"
            for name in named
        ]
        rows.append(["{} -> {} as {} -> {}".format(*row["channels"], *row["padded"]), *cells])
    return rows

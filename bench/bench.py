"""Time this code beside the plain published forward pass (reference.py), in one process, in turn.

    python bench/bench.py                        # the CPU's sections, some minutes
    python bench/bench.py --only inference
    python bench/bench.py --only variants        # ways to do a training step: bf16, torch.compile, parts, ...
    python bench/bench.py --device cuda --only steps convolutions --json numbers.json

This code computes in its device's default precision: float32 on the CPU, 16 bits on a CUDA GPU. The reference computes
in float32, on a GPU without TF32.

FLOPs are nominal: those of the plain algorithm, two for each of `Network.macs_per_pixel`, and three forward passes per
training step. This code does fewer multiplications, so its share of the limit may exceed 100 %. The limits are measured
in the same run: the best rates of a large float32 matrix product and of a large copy. Peak memory is what a first call
adds; on a CPU each is measured in a fresh process.

A section that fails does not stop the others; the exit status is 1 then.
"""

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "config"))

import torch

import report
from base.console import Parser, run_script
from base.devices import pick_device
from base.errors import BadArgument
from sections import SECTIONS, SIZES, Job
from timing import Numbers, alternate, first_call

DEFAULT_SECTIONS = {"cpu": ("inference", "training", "startup", "data"), "cuda": tuple(SECTIONS)}


def describe_machine(device: torch.device) -> Numbers:
    numbers = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "device": str(device),
    }
    if device.type == "cuda":
        numbers["gpu"] = torch.cuda.get_device_name(device)
    return numbers


def _cpu_model() -> str:
    try:
        return re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1].strip()
    except (OSError, TypeError):  # no such file, or no such line on some processors
        return platform.processor() or platform.machine()


def measure_limits(device: torch.device, side: int, megabytes: int) -> Numbers:
    """The best GFLOP/s of matrix products of `side` cubed, and the best GB/s, read and written, of a copy."""
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    a_bf16, b_bf16 = a.bfloat16(), b.bfloat16()
    x = torch.rand(megabytes * 2**18, device=device)
    y = torch.empty_like(x)
    runs = {
        "float32": lambda: torch.mm(a, b),
        "bf16": lambda: torch.mm(a_bf16, b_bf16),
        "copy": lambda: y.copy_(x),
    }
    alternate(runs, device, 1, 0)
    seconds = {name: min(s) for name, s in alternate(runs, device, 10, 0).items()}
    return {
        "gflops": 2e-9 * side**3 / seconds["float32"],
        "gflops_bf16": 2e-9 * side**3 / seconds["bf16"],
        "side": side,
        "gb_per_second": 2e-9 * x.nbytes / seconds["copy"],
        "megabytes": megabytes,
    }


def bench(job: Job, names: Sequence[str], path: Path | None) -> None:
    """Measure and print sections in turn; their numbers go to the file at `path` as soon as they are there."""
    machine = describe_machine(job.device)
    limits = job.limits = measure_limits(job.device, job.sizes.matrix, job.sizes.megabytes)
    print("machine:", ", ".join(f"{name} {value}" for name, value in machine.items()))
    print(
        f"limits:  matrix product of {limits['side']} cubed: {limits['gflops']:.1f} GFLOP/s in float32, "
        f"{limits['gflops_bf16']:.1f} in bf16; copy of {limits['megabytes']} MiB: {limits['gb_per_second']:.1f} GB/s",
        flush=True,
    )
    report.add(path, {"machine": machine, "limits": limits, "sizes": asdict(job.sizes)})
    for name in names:
        if found := job.attempt(name, partial(SECTIONS[name], job)):
            numbers, text = found
            print(f"\n{text}", flush=True)
            report.add(path, {name: numbers})
    if job.failed:
        print(f"\nfailed: {'; '.join(job.failed)}")


def main(arguments: list[str]) -> int:
    parser = Parser(description="Time this code beside the plain published forward pass, and print tables.")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="measure these alone, in this order")
    parser.add_argument("--repeats", type=int, help="timings of each; default: as many as some time allows")
    parser.add_argument("--rehearse", action="store_true", help="tiny images and crops: see that everything runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add all numbers to this file")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # for `Job.peak`: a kind and a variant
    known = parser.parse_args(arguments)
    device = pick_device(known.device)
    if device.type not in DEFAULT_SECTIONS:
        raise BadArgument(f"device {known.device!r}: the benchmark knows cpu and cuda")
    if known.repeats is not None and known.repeats < 1:
        raise BadArgument(f"--repeats must be at least 1, got {known.repeats}")
    job = Job(device, SIZES["rehearsal" if known.rehearse else device.type], known.repeats)
    if known.peak:
        print(json.dumps(first_call(job.make(*known.peak), device)[1]))
        return 0
    bench(job, known.only or DEFAULT_SECTIONS[device.type], known.json)
    return 1 if job.failed else 0


if __name__ == "__main__":
    run_script(main)

"""Time this code beside the plain published forward pass (reference.py), in one process, in turn.

    python bench/bench.py                        # the CPU's sections, some minutes
    python bench/bench.py --only inference
    python bench/bench.py --only variants        # ways to do a training step: bf16, torch.compile, parts, ...
    python bench/bench.py --device cuda --only steps convolutions --json numbers.json

This code computes in its device's default precision: float32 on the CPU, 16 bits on a CUDA GPU. The reference computes
in float32, on a GPU without TF32.

FLOPs are nominal: those of the plain algorithm, two for each of `Network.macs_per_pixel`, and three forward passes per
training step. This code does fewer multiplications, so its share of the limit, the best rate of a large matrix product
in the same run, may exceed 100 %. Peak memory is what a first call adds; on a CPU each is measured in a fresh process.

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

import base.openmp  # noqa: F401

import torch

import report
from base.console import Parser, run_script
from base.devices import pick_device
from base.errors import BadArgument
from sections import SECTIONS, SIZES, Job
from timing import Numbers, alternate, first_call

DEFAULT_SECTIONS = {"cpu": ("inference", "training", "startup", "data"), "cuda": tuple(SECTIONS)}


def describe_machine(device: torch.device) -> Numbers:
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }


def _cpu_model() -> str:
    try:
        return re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1].strip()
    except (OSError, TypeError):  # no such file, or no such line on some processors
        return platform.processor() or platform.machine()


def measure_limits(device: torch.device, side: int) -> Numbers:
    """The best GFLOP/s of products of square matrices of this side, in float32 and in bf16."""
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    a_bf16, b_bf16 = a.bfloat16(), b.bfloat16()
    runs = {"gflops": lambda: torch.mm(a, b), "gflops_bf16": lambda: torch.mm(a_bf16, b_bf16)}
    alternate(runs, device, 1, 0)
    return {name: 2e-9 * side**3 / min(s) for name, s in alternate(runs, device, 10, 0).items()}


def bench(job: Job, names: Sequence[str], path: Path | None) -> None:
    """Measure and print sections in turn; their numbers go to the file at `path` as soon as they are there."""
    machine = describe_machine(job.device)
    limits = job.limits = measure_limits(job.device, job.sizes.matrix)
    print("machine:", ", ".join(f"{name} {value}" for name, value in machine.items()))
    print("limits: ", ", ".join(f"{name} {value:.1f}" for name, value in limits.items()), flush=True)
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

"""Seconds and memory of functions: called in turn, medians, and the peak of a first call."""

import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Numbers = dict[str, Any]
LEAST, MOST = 3, 30  # repeats, where no number is given


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable, device: torch.device) -> float:
    """Seconds of one call."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def alternate(
    runs: dict[str, Callable], device: torch.device, repeats: int | None, budget: float, settle: bool = False
) -> dict[str, list[float]]:
    """Seconds of each call: all runs in turn, `repeats` times, or as often as `budget` seconds allow.

    In turn, because the machine's speed drifts while other work comes and goes. With `settle`, each is called once
    untimed before: right after the other, a run starts with that one's caches and clock rate, which on a CPU with
    AVX-512 cost the same run up to half as much time again.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    for done in range(1, (repeats or MOST) + 1):
        for name, run in runs.items():
            if settle:
                run()
            seconds[name].append(timed(run, device))
        elapsed = time.perf_counter() - started
        if not repeats and done >= LEAST and elapsed * (done + 1) / done > budget:
            break
    return seconds


def summary(seconds: list[float]) -> Numbers:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "seconds": seconds}


def first_call(run: Callable, device: torch.device) -> tuple[Any, Numbers]:
    """What the first call returns, and its `seconds`, the bytes in use `before` it, and those `added` at its peak.

    On a GPU the bytes are those of PyTorch's tensors. On a CPU they are the process's highest so far, so that only a
    fresh process shows what a call adds.
    """
    before = _memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronize(device)
    started = time.perf_counter()
    result = run()
    synchronize(device)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _memory(device)
    return result, {"seconds": seconds, "before": before, "added": max(0, peak - before)}


def _memory(device: torch.device) -> int:
    """Bytes of tensors on a GPU now; on a CPU, bytes of this process at its peak."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    import resource  # Unix only, as the tests and scripts are, but importing this module should need nothing

    status = Path("/proc/self/status")
    if status.exists():  # Linux: there ru_maxrss of a young process is its parent's
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak

"""Time a training step and an image beside processes that keep all cores busy, with several ways for OpenMP to wait.

    python bench/busy.py                    # beside a busy process per core
    python bench/busy.py --busy 0           # on an idle machine, with the larger inputs of bench.py
    python bench/busy.py --ways OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=10000 OMP_NUM_THREADS=1

"here" is the way of base/openmp.py, "default" that of libgomp. Each way has a process of its own; all take turns.
"""

import argparse
import os
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "config"))

from base.openmp import VARIABLES

import torch

import report
from base.console import Parser, run_script
from base.errors import BadArgument, LostProcess
from sections import SIZES, Job, Sizes, table
from timing import Numbers, alternate, summary

TASKS = ("training", "inference")  # kinds of workloads.py
DEFAULT = "GOMP_SPINCOUNT=300000"  # which libgomp takes where nothing is set
SMALL = Sizes(image=(160, 240), batch=2)  # beside busy processes, where the default takes long


def work(job: Job) -> None:
    """Answer each task that standard input names with a line when it is done; the first ones warm up."""
    runs = {task: job.make(task, "this code") for task in TASKS}
    for line in sys.stdin:
        runs[line.strip()]()
        print("done", flush=True)


def environment(way: str) -> dict[str, str]:
    """The variables of a process that waits this way: "here", "default" or NAME=VALUE."""
    others = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    if way == "here":
        return others
    name, _, value = (DEFAULT if way == "default" else way).partition("=")
    return {**others, name: value}


def start(stack: ExitStack, *arguments: str, **options) -> subprocess.Popen:
    """A process of Python that ends with `stack`."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = stack.enter_context(subprocess.Popen([sys.executable, *arguments], **pipes, **options))
    stack.callback(process.kill)
    return process


def ask(worker: subprocess.Popen, task: str) -> None:
    """Have a task done. Raises LostProcess where the worker has ended."""
    worker.stdin.write(f"{task}\n")
    worker.stdin.flush()
    if not worker.stdout.readline():
        raise LostProcess(f"a process of the benchmark has ended: {' '.join(worker.args)}")


def measure(ways: list[str], busy: int, repeats: int, words: list[str]) -> dict[str, dict[str, Numbers]]:
    """Seconds of each task in each way, by workers with these arguments."""
    with ExitStack() as stack:
        words = [__file__, "--work", *words]
        workers = {way: start(stack, *words, env=environment(way)) for way in ways}
        runs = {task: {way: partial(ask, workers[way], task) for way in ways} for task in TASKS}
        for run in (run for task in runs.values() for run in task.values()):
            run()
        for _ in range(busy):
            start(stack, "-c", "while True: pass")
        seconds = {task: alternate(runs[task], torch.device("cpu"), repeats, 0) for task in TASKS}
    return {way: {task: summary(seconds[task][way]) for task in TASKS} for way in ways}


def main(arguments: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--busy", type=int, default=os.cpu_count(), help="busy processes; default: one per core")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each; default: %(default)s")
    parser.add_argument("--ways", nargs="+", default=[], metavar="NAME=VALUE", help="more ways: environment variables")
    parser.add_argument("--rehearse", action="store_true", help="tiny images and crops: see that everything runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the numbers to this file")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    known = parser.parse_args(arguments)
    sizes = SIZES["rehearsal"] if known.rehearse else SMALL if known.busy else SIZES["cpu"]
    job = Job(torch.device("cpu"), sizes)
    if known.work:
        return work(job)
    if known.busy < 0 or known.repeats < 1 or not all("=" in way for way in known.ways):
        raise BadArgument("--busy must be at least 0, --repeats at least 1, and a way NAME=VALUE")
    numbers = measure(["here", "default", *known.ways], known.busy, known.repeats, arguments)
    rows = [
        [way, *(f"{n['median']:.2f} ({n['min']:.2f} .. {n['max']:.2f})" for n in numbers[way].values())]
        for way in numbers
    ]
    columns = [f"step, {sizes.batch} crops", f"{sizes.image[1]}x{sizes.image[0]} image"]
    print(table(f"beside {known.busy} busy processes: median (min .. max), s", columns, rows))
    report.add(known.json, {f"beside {known.busy} busy processes": numbers})


if __name__ == "__main__":
    run_script(main)

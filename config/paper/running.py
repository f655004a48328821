"""Training and testing rows, several at once, each in a process of main.py that can be stopped and resumed."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from base.console import Interrupt, log
from base.files import ROOT
from paper.packing import Archive
from paper.results import collect, describe_result, read_result, write_result
from paper.rows import Run
from settings import FIELDS, NETWORK_FIELDS

POLL = 0.2  # seconds between two looks at the processes


def is_done(run: Run) -> bool:
    """Whether the row has a result, with all steps."""
    result = read_result(run.name)
    return bool(result) and result["tested"] == run.row.checkpoint and result["steps"] >= run.settings.steps


class Job(NamedTuple):
    """A process of main.py that trains or tests a run."""

    run: Run
    action: str  # "train" or "test"
    process: subprocess.Popen
    output: Path


def start(run: Run, action: str, environment: dict[str, str]) -> Job:
    """Start a training or a test; what it prints goes to the run's tables.log."""
    words = ["-p", run.row.preset] if action == "train" else ["-m", f"{run.name}/{run.row.checkpoint}"]
    for name in FIELDS:
        if name not in NETWORK_FIELDS:  # all others: a checkpoint from another machine must not decide on any
            value = getattr(run.settings, name)
            words += [f"--{name}", *map(str, value)] if isinstance(value, tuple) else [f"--{name}={value}"]
    path = run.settings.log_path / "tables.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        command = [sys.executable, str(ROOT / "config" / "main.py"), "-a", action, *words]
        return Job(run, action, subprocess.Popen(command, stdout=file, stderr=file, env=environment), path)


class Runner:
    """Runs that wait, jobs under way, and runs that ended without a result."""

    def __init__(self, runs: list[Run], at_once: int):
        self.waiting, self.jobs, self.missed = runs, [], []
        self.at_once = at_once
        self.environment = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // at_once)), **os.environ}

    def fill(self) -> None:
        """Start the next trainings, up to `at_once`."""
        while self.waiting and len(self.jobs) < self.at_once:
            run = self.waiting.pop(0)
            log.info(f"{run.name}: from step {run.step} to {run.settings.steps}")
            self.jobs.append(start(run, "train", self.environment))

    def advance(self, stopping: bool) -> None:
        """Look at the processes that have ended: a training is tested, a test becomes a result."""
        for job in [job for job in self.jobs if job.process.poll() is not None]:
            self.jobs.remove(job)
            run, failed = job.run, job.process.returncode != 0
            if failed and not stopping:
                lines = job.output.read_text(errors="replace").splitlines() or ["no output"]
                log.warning(f"{run.name}: {job.action} failed: {lines[-1]}")
                self.missed.append(run)
            elif failed or (job.action == "train" and (stopping or run.step < run.settings.steps)):
                log.info(f"{run.name}: stopped at step {run.step} of {run.settings.steps}")
                self.missed.append(run)
            elif job.action == "train":
                self.jobs.append(start(run, "test", self.environment))
            else:
                result = collect(run)
                log.info(f"{run.name}: {describe_result(result)}, {write_result(run.name, result)}")


def run_rows(runs: list[Run], at_once: int, minutes: float, archive: Archive | None = None) -> bool:
    """Train and test what has no result, `at_once` together; whether all have one now.

    After `minutes` (0: never), on Ctrl-C or SIGTERM, the trainings save and stop; the next call resumes them. The
    archive is kept current meanwhile.
    """
    missing = [run for run in runs if not is_done(run)]
    log.info(f"{len(runs) - len(missing)} of {len(runs)} rows have their result")
    runner = Runner(missing, at_once)
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    stopping = False
    with Interrupt() as stop:
        while runner.jobs or (runner.waiting and not stopping):
            if not stopping and (stop.requested or time.monotonic() > end):
                stopping = True
                for job in runner.jobs:
                    job.process.terminate()
            if not stopping:
                runner.fill()
            time.sleep(POLL)
            if archive:
                archive.keep_current()
            runner.advance(stopping)
    if archive:
        archive.write()
    if runner.waiting:
        log.info(f"not started: {', '.join(run.name for run in runner.waiting)}")
    return not (runner.waiting or runner.missed)

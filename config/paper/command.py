"""`-a tables`: the paper's tables from one command, from trainings to Markdown.

    python main.py -a tables                                    # every row and its state
    python main.py -a tables --run dsen_rain800 sdsen_rain800   # train, test, write results/NAME.json
    python main.py -a tables --run all --jobs 4 --pack runs.zip # the missing rows; runs.zip is kept current
    python main.py -a tables --take runs.zip                    # unpack; --run then resumes these runs
    python main.py -a tables --write                            # render the tables of README.md and docs/RESULTS.md

A row trains in a run of its own name and resumes where it was stopped. Other settings go to all trainings.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from base.console import Interrupt, Parser, log
from base.errors import BadArgument, MissingFile, NotWritable, UserError
from base.files import ROOT
from paper.packing import pack, take
from paper.rows import Run, all_rows, find_row, find_run, parse_name, rows_with_runs
from paper.tables import Result, collect, last_scores, read_results, write_result, write_tables
from settings import FIELDS, NETWORK_FIELDS, read_overrides, resolve

POLL = 0.2  # seconds between two looks at the processes
PACK_SECONDS = 60  # at least, between two archives of running trainings
SHOW_SECONDS = 300  # between two lines about what runs


def main(words: list[str]) -> int:
    """What `-a tables` does with the rest of the command line; returns the exit status."""
    parser = Parser(prog="main.py -a tables", description="List, run, pack or render the rows of the paper's tables.")
    parser.add_argument("--run", nargs="+", metavar="NAME", help="rows to train and test, or `all`")
    parser.add_argument("--jobs", type=int, default=1, help="rows at once; default: %(default)s")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="save and stop after this many minutes; default: never"
    )
    parser.add_argument("--take", type=Path, metavar="FILE", help="unpack the runs of an archive first")
    what = "archive from which runs resume: with --run, kept current; without it, of every run of a row"
    parser.add_argument("--pack", type=Path, metavar="FILE", help=what)
    parser.add_argument("--write", action="store_true", help="render the tables of README.md and docs/RESULTS.md")
    known, rest = parser.parse_known_args(words)
    if known.jobs < 1 or not known.minutes >= 0:
        raise BadArgument(f"--jobs must be at least 1, --minutes at least 0: got {known.jobs} and {known.minutes:g}")
    overrides = read_overrides(rest)
    if fixed := sorted({"run", "seed", *NETWORK_FIELDS} & overrides.keys()):
        raise BadArgument(f"--{fixed[0]} is fixed by the row: choose another row")
    rows = all_rows() if known.run == ["all"] else [find_row(name) for name in known.run or ()]
    runs = [find_run(row, overrides) for row in rows]
    done = True
    if known.take:
        take(known.take, overrides)
    packed = runs_to_pack(known.pack, runs, overrides) if known.pack else []
    if known.run:
        done = run_rows(runs, known.jobs, known.minutes, known.pack, packed)
    elif known.pack:
        pack(known.pack, packed)
        log.info(f"{known.pack} holds {', '.join(run.name for run in packed)}")
    if known.write:
        write_tables()
    if not (known.run or known.take or known.pack or known.write):
        list_rows(overrides)
    return 0 if done else 1


def runs_to_pack(path: Path, runs: list[Run], overrides: dict[str, Any]) -> list[Run]:
    """`runs`, else all runs of rows in model_dir, and those of an archive that is replaced, which are taken first."""
    runs = runs or [find_run(row, overrides) for row in rows_with_runs(overrides)]
    runs = list(dict.fromkeys([*runs, *(take(path, overrides) if path.exists() else ())]))
    if not runs:
        raise MissingFile(f"{resolve(overrides=overrides).model_dir} has no run of a row")
    return runs


def list_rows(overrides: dict[str, Any]) -> None:
    """Print the rows of the tables with their state, and those of other recipes and seeds that have a result or run."""
    results = read_results()
    log.info(f"{'row':32}{'in the paper':>16}  state")
    for row in dict.fromkeys([*all_rows(), *filter(None, map(parse_name, results)), *rows_with_runs(overrides)]):
        state = _describe(results[row.name]) if row.name in results else _progress(find_run(row, overrides))
        log.info(f"{row.name:32}{row.paper_scores:>16}  {state}")


def _describe(result: Result) -> str:
    return f"{' dB / '.join(last_scores(result))} after {result['steps']} steps"


def _progress(run: Run) -> str:
    try:
        return f"step {step} of {run.settings.steps}" if (step := run.step) else "no run"
    except UserError as error:
        return str(error)


def is_done(run: Run) -> bool:
    """Whether the row has a result, with all steps."""
    result = read_results().get(run.name)
    return bool(result) and result["tested"] == run.row.checkpoint and result["steps"] >= run.settings.steps


class Job(NamedTuple):
    """A process of main.py that trains or tests a run."""

    run: Run
    action: str  # "train" or "test"
    process: subprocess.Popen


def start(run: Run, action: str, at_once: int) -> Job:
    """Start a training or a test, of which `at_once` share the cores; what it prints goes to the run's tables.log."""
    words = ["-p", run.row.preset] if action == "train" else ["-m", f"{run.name}/{run.row.checkpoint}"]
    for name in FIELDS:
        if name not in NETWORK_FIELDS:  # all others: a checkpoint from another machine must not decide on any
            value = getattr(run.settings, name)
            words += [f"--{name}", *map(str, value)] if isinstance(value, tuple) else [f"--{name}={value}"]
    environment = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // at_once)), **os.environ}
    run.settings.log_path.mkdir(parents=True, exist_ok=True)
    with open(run.file("tables.log"), "a") as file:
        command = [sys.executable, str(ROOT / "config" / "main.py"), "-a", action, *words]
        return Job(run, action, subprocess.Popen(command, stdout=file, stderr=file, env=environment))


def finish(job: Job, stopping: bool) -> bool:
    """Log how a job ended, and write the result of a test; whether the run can be tested now."""
    run, failed = job.run, job.process.returncode != 0
    if failed and not stopping:
        lines = run.file("tables.log").read_text(errors="replace").splitlines() or ["no output"]
        log.warning(f"{run.name}: {job.action} failed: {lines[-1]}")
    elif job.action == "test" and not failed:
        result = collect(run)
        log.info(f"{run.name}: {_describe(result)}, {write_result(run.name, result)}")
    elif stopping or run.step < run.settings.steps:
        log.info(f"{run.name}: stopped at step {run.step} of {run.settings.steps}")
    else:
        return True
    return False


def run_rows(runs: list[Run], at_once: int, minutes: float, archive: Path | None, packed: list[Run]) -> bool:
    """Train and test what has no result, `at_once` together; whether all have one now.

    After `minutes` (0: never), on Ctrl-C or SIGTERM, the trainings save and stop; the next call resumes them. An
    archive of the runs `packed` is kept current meanwhile.
    """
    waiting = [run for run in runs if not is_done(run)]
    log.info(f"{len(runs) - len(waiting)} of {len(runs)} rows have their result")
    jobs: list[Job] = []
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    stopping, written, shown = False, float("-inf"), time.monotonic()
    with Interrupt() as stop:
        while jobs or (waiting and not stopping):
            if not stopping and (stop.requested or time.monotonic() > end):
                stopping = True
                for job in jobs:
                    job.process.terminate()
            while waiting and not stopping and len(jobs) < at_once:
                run = waiting.pop(0)
                log.info(f"{run.name}: from step {run.step} to {run.settings.steps}")
                jobs.append(start(run, "train", at_once))
            time.sleep(POLL)
            if archive and time.monotonic() - written > PACK_SECONDS:
                written = time.monotonic()
                try:
                    pack(archive, packed)
                except NotWritable as error:  # the trainings run on, and the next minute tries again
                    log.warning(str(error))
            if time.monotonic() - shown > SHOW_SECONDS:
                shown = time.monotonic()
                log.info("; ".join(f"{job.action} {job.run.name}: {_progress(job.run)}" for job in jobs))
            for job in [job for job in jobs if job.process.poll() is not None]:
                jobs.remove(job)
                if finish(job, stopping):
                    jobs.append(start(job.run, "test", at_once))
    if archive:
        pack(archive, packed)
    return all(map(is_done, runs))

"""`-a tables`: the paper's tables from one command, from trainings to Markdown.

    python main.py -a tables                                    # every row and its state
    python main.py -a tables --run dsen_rain800 sdsen_rain800   # train, test, write results/NAME.json
    python main.py -a tables --run all --jobs 4 --minutes 60    # the missing rows, four at once, for an hour
    python main.py -a tables --run all --pack runs.zip          # the same, and keep runs.zip current
    python main.py -a tables --pack runs.zip                    # pack every run of a row
    python main.py -a tables --take runs.zip                    # unpack; --run then resumes these runs
    python main.py -a tables --write                            # render the tables of README.md and docs/RESULTS.md

A row trains in a run of its own name and resumes where it was stopped. Settings behind these arguments (`--device cpu`,
`--data_dir DIR`, ...) go to all trainings and stand in the result.
"""

from pathlib import Path
from typing import Any

from base.console import Parser, log
from base.errors import BadArgument, Mismatch, MissingFile
from paper.packing import Archive, take
from paper.results import describe_result, read_result, read_results
from paper.rows import Row, all_rows, find_row, find_run, parse_name, rows_with_runs
from paper.running import run_rows
from paper.tables import write_tables
from settings import NETWORK_FIELDS, read_overrides, resolve


def main(words: list[str]) -> int:
    """What `-a tables` does with the rest of the command line; returns the exit status."""
    parser = Parser(prog="main.py -a tables", description="List, run, pack or render the rows of the paper's tables.")
    parser.add_argument("--run", nargs="+", metavar="NAME", help="rows to train and test, or `all`")
    parser.add_argument("--jobs", type=int, default=1, help="rows at once; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=0.0, help="save and stop after so many; default: never")
    parser.add_argument("--take", type=Path, metavar="FILE", help="first unpack the runs of an archive")
    parser.add_argument(
        "--pack",
        type=Path,
        metavar="FILE",
        help="archive from which runs resume: with --run, kept current; without it, of every run of a row",
    )
    parser.add_argument("--write", action="store_true", help="render the tables of README.md and docs/RESULTS.md")
    known, rest = parser.parse_known_args(words)
    if known.jobs < 1 or known.minutes < 0:
        raise BadArgument(f"--jobs must be at least 1, --minutes at least 0: got {known.jobs} and {known.minutes:g}")
    overrides = read_overrides(rest)
    for name in {"run", "seed", *NETWORK_FIELDS} & overrides.keys():
        raise BadArgument(f"--{name} is fixed by the row: choose another row")
    rows = all_rows() if known.run == ["all"] else [find_row(name) for name in known.run or ()]
    done = True
    if known.take:
        take(known.take, overrides)
    if known.run:
        archive = Archive(known.pack, rows, overrides) if known.pack else None
        done = run_rows([find_run(row, overrides) for row in rows], known.jobs, known.minutes, archive)
    elif known.pack:
        pack(known.pack, overrides)
    if known.write:
        write_tables()
    if not (known.run or known.take or known.pack or known.write):
        list_rows(overrides)
    return 0 if done else 1


def pack(path: Path, overrides: dict[str, Any]) -> None:
    """Pack every run of a row that lies in model_dir. Raises MissingFile where there is none."""
    rows = rows_with_runs(overrides)
    if not rows:
        raise MissingFile(f"{resolve(overrides=overrides).model_dir} has no run of a row")
    Archive(path, rows, overrides).write()


def list_rows(overrides: dict[str, Any]) -> None:
    """Print the rows of the tables with their state, and those of other recipes and seeds that have a result or run."""
    others = filter(None, map(parse_name, read_results()))
    log.info(f"{'row':32}{'in the paper':>16}  state")
    for row in dict.fromkeys([*all_rows(), *others, *rows_with_runs(overrides)]):
        log.info(f"{row.name:32}{row.paper_scores:>16}  {_state(row, overrides)}")


def _state(row: Row, overrides: dict[str, Any]) -> str:
    if result := read_result(row.name):
        return describe_result(result)
    run = find_run(row, overrides)
    try:
        return f"step {step} of {run.settings.steps}" if (step := run.step) else "no run"
    except Mismatch as error:
        return str(error)

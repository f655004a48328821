"""The paper's tables from one command: which runs they need, the runs, and the tables rendered from their results.

    python main.py -a tables                                    # every row and its state
    python main.py -a tables --run dsen_rain800 sdsen_rain800   # trains, tests, writes results/NAME.json
    python main.py -a tables --run all --jobs 4 --minutes 60    # what is missing, four at once, an hour long
    python main.py -a tables --run all --pack runs.zip          # keeps an archive of the runs current meanwhile
    python main.py -a tables --pack runs.zip                    # packs every run of a row that there is
    python main.py -a tables --take runs.zip                    # takes an archive in; --run resumes its runs
    python main.py -a tables --write                            # the README's tables and results/README.md

A row is a preset, a data set, a recipe and a seed. It trains in a run of its own name, which resumes where it was
stopped, on this machine or, packed and taken in, on another. With the paper's recipe the last step's weights are
tested, with the others the best ones by validation. Settings that are typed behind (`--device cpu`, `--data_dir DIR`,
..) go to all trainings and stand in the result; a row with fewer steps or smaller batches than its recipe says is
marked by them.
"""

import csv
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from base.console import Interrupt, Parser, log
from base.errors import UserError
from base.files import ROOT, write_bytes
from cal_ssim import METRICS
from paper import packing, studies
from paper.studies import RESULTS
from presets import PRESETS
from runs import checkpoints
from settings import NETWORK_FIELDS, Settings, map_paths, read_overrides, resolve, to_dict

README, PAGE = ROOT / "README.md", ROOT / "results" / "README.md"
DATA = {"rain800": "Zhang800", "rain100h": "Rain100H"}  # folder in data/, name in the paper
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},  # the defaults of settings.py
    # For a CPU: an eightieth of the crops, in batches of eight or of four.
    "short": {"epochs": 0, "steps": 2000, "batch_size": 8, "lr": 1e-3, "milestones": (1500, 1750), "clip_norm": 0.1},
    "small": {"epochs": 0, "steps": 4000, "batch_size": 4, "lr": 1e-3, "milestones": (3000, 3700), "clip_norm": 0.1},
}
# Of other networks, as many steps as take the CPU time that the recipe takes with DSEN, with crops of their own size.
SAME_TIME = {
    ("short", "coarse2fine"): {"steps": 730, "batch_size": 3, "milestones": (550, 640), "clip_norm": 1.0},
    ("short", "php"): {"steps": 4300, "batch_size": 1, "patch_size": 160, "milestones": (3200, 3800), "clip_norm": 1.0},
}
# What a recipe fixes. A run that was begun with other values is another run.
RECIPE = (
    "patch_size batch_size aug_data rain seed epochs lr schedule milestones warmup clip_norm loss loss_stages average"
).split()
PLACES = ("data_dir", "model_dir", "log_dir", "device", "precision", "memory_gib", "mirror")  # that a test is told
# PSNR and SSIM in the S-DSEN paper: on Rain100H, then on Zhang800.
PAPER = {
    "cnn": (23.36, 0.7557, 22.88, 0.8127),
    "cnn_da": (22.21, 0.7055, 24.04, 0.8044),
    "cnn_c4da": (22.74, 0.7320, 22.49, 0.7891),
    "dsen": (23.60, 0.7618, 23.39, 0.8162),
    "dsen_maxpool": (22.83, 0.7359, 22.30, 0.7916),
    "dsen_avgpool": (22.86, 0.7382, 22.30, 0.7916),
    "dsen_wo_se": (23.46, 0.7595, 22.53, 0.8035),
    "mcnn": (23.70, 0.7226, 22.90, 0.7965),
    "mcnn_sr": (26.36, 0.8395, 23.52, 0.8362),
    "mdsen": (23.98, 0.7295, 23.48, 0.8000),
    "mdsen_sc": (25.84, 0.8182, 23.79, 0.8269),
    "sdsen": (27.16, 0.8589, 23.64, 0.8379),
    "sdsen_s2": (25.04, 0.8028, 23.53, 0.8270),
    "sdsen_s4": (26.24, 0.8328, 23.74, 0.8340),
    "sdsen_s6": (26.90, 0.8520, 23.66, 0.8364),
}
TABLES = {
    "Table 1": ("cnn", "cnn_da", "cnn_c4da", "dsen"),
    "Table 2": ("dsen_maxpool", "dsen_avgpool", "dsen_wo_se", "dsen", "mcnn", "mcnn_sr", "mdsen", "mdsen_sc", "sdsen"),
    "Table 3": ("sdsen_s2", "sdsen_s4", "sdsen_s6", "sdsen"),
    "Table 4": ("dsen", "sdsen"),
    "Other networks": ("dsen", "coarse2fine", "php"),
}


class Row(NamedTuple):
    preset: str
    data: str
    recipe: str = "paper"
    seed: int = 0

    @property
    def name(self) -> str:
        """`PRESET_DATA`, with the recipe if it is not the paper's, and the seed if it is not 0."""
        recipe = "" if self.recipe == "paper" else f"_{self.recipe}"
        return f"{self.preset}_{self.data}{recipe}" + (f"_seed{self.seed}" if self.seed else "")

    @property
    def tested(self) -> str:
        """The checkpoint that is tested. The paper names no validation, so with its recipe it is the last step's."""
        return "latest" if self.recipe == "paper" else "best"

    def settings(self, overrides: dict[str, Any]) -> Settings:
        """The settings of the row's training, with what was typed besides."""
        row = {"run": self.name, "data_dir": str(ROOT / "data" / self.data), "seed": self.seed}
        plain = resolve(self.preset)
        recipe = {**RECIPES[self.recipe], **SAME_TIME.get((self.recipe, plain.network), {})}
        settings = {**row, **recipe, **overrides}
        return resolve(self.preset, settings)

    @property
    def paper(self) -> str:
        """PSNR and SSIM in the S-DSEN paper; "-" where it has no such row."""
        if self.preset not in PAPER:
            return "-"
        scores = PAPER[self.preset]
        return "{:.2f} / {:.4f}".format(*(scores[:2] if self.data == "rain100h" else scores[2:]))


def find_row(name: str) -> Row:
    """The row of a name. Raises UserError where there is none."""
    match = re.fullmatch(r"(.+)_(rain800|rain100h)(?:_([a-z]+))??(?:_seed(\d+))?", name)
    if match and match[1] in PRESETS and (match[3] or "paper") in RECIPES:
        return Row(match[1], match[2], match[3] or "paper", int(match[4] or 0))
    raise UserError(
        f"no row is called {name!r}: it is PRESET_DATA, as dsen_rain800, or PRESET_DATA_RECIPE_seedN; "
        f"presets: {', '.join(PRESETS)}; data: {', '.join(DATA)}; recipes: {', '.join(RECIPES)}"
    )


def row_of(run: str) -> Row | None:
    """The row that a run is named after; None where there is none."""
    try:
        row = find_row(run)
    except UserError:
        return None
    return row if row.name == run else None


def all_rows() -> list[Row]:
    """The rows of the tables, each once."""
    presets = dict.fromkeys(preset for table in TABLES.values() for preset in table)
    return [Row(preset, data) for data in DATA for preset in presets]


def _to_words(values: dict[str, Any]) -> list[str]:
    """Settings as words of a command line."""
    words = []
    for name, value in values.items():
        words += [f"--{name}", *map(str, value)] if isinstance(value, tuple) else [f"--{name}={value}"]
    return words


# ---------------------------------------------------------------- state and results


def read_result(name: str) -> dict[str, Any] | None:
    """The result of a row; None where there is none. Raises UserError where the file is not one."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path} is no JSON: remove it, and run the row again") from None


def write_result(row: Row, settings: Settings) -> dict[str, Any]:
    """Collect what the row's training and test left into results/NAME.json."""
    checkpoint = checkpoints.load(settings.model_path / "latest.pth")
    with open(settings.log_path / f"test_{row.tested}.csv") as file:
        images = list(csv.DictReader(file))
    places = [match[1] for column in images[0] if (match := re.fullmatch(r"psnr_(input|stage_\d+)", column))]
    scores = {
        place: {metric: _mean(float(image[f"{metric}_{place}"]) for image in images) for metric in METRICS}
        for place in places
    }
    drawn = Path(settings.data_dir) / "train" / "drawn.txt"
    result = {
        **row._asdict(),
        "steps": checkpoint.step,
        "tested": row.tested,
        "seconds": round(checkpoint.seconds, 1) or None,  # older checkpoints did not count them
        "device": checkpoint.device,
        "versions": {**checkpoint.versions, "code": code_version()},
        "train_rain": settings.rain or (drawn.read_text().strip() if drawn.is_file() else "as in the data set"),
        "test_images": len(images),
        "test": scores,
        "validation": validation_curve((settings.log_path / "train.log").read_text(errors="replace")),
        "settings": _portable(settings),
    }
    studies.write_json(RESULTS / f"{row.name}.json", result)
    return result


def _portable(settings: Settings) -> dict[str, Any]:
    """The settings, of paths the last part alone: where a folder lies says something of one machine only."""
    return {**to_dict(settings), **map_paths(settings, lambda path: Path(path).name)}


def _mean(values: Iterator[float]) -> float:
    values = [value for value in values if value == value]  # an image smaller than SSIM's window has none
    return round(sum(values) / len(values), 4)


def tested_checkpoint(result: dict[str, Any]) -> str:
    """The checkpoint that a result is of; where it does not say so, the best one by validation."""
    return result.get("tested", "best")


def validation_curve(text: str) -> list[list[float]]:
    """[step, PSNR in dB, SSIM] of a train.log; of a step that was done twice, after a kill, the last."""
    pattern = r"validation at step (\d+): psnr by stage .*?(\d+\.\d+) dB .*?ssim (\d+\.\d+)"
    found = {int(step): [int(step), float(psnr), float(ssim)] for step, psnr, ssim in re.findall(pattern, text)}
    return [found[step] for step in sorted(found)]


def code_version() -> str:
    """What git calls this state of the code; "unknown" where there is no git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---------------------------------------------------------------- running


class Job:
    """One row on its way: its training, then its test, each a process of main.py."""

    def __init__(self, row: Row, overrides: dict[str, Any]):
        self.row, self.overrides = row, overrides
        self.settings = row.settings(overrides)
        self.part, self.process = "", None

    @property
    def step(self) -> int:
        """Steps that the row's checkpoint has had. Raises UserError where it was begun in another way."""
        latest = self.settings.model_path / "latest.pth"
        if not latest.is_file():
            return 0
        checkpoint = checkpoints.load(latest)
        if name := packing.difference(RECIPE, self.settings, checkpoint.settings):
            wanted, found = getattr(self.settings, name), getattr(checkpoint.settings, name, None)
            raise UserError(
                f"{latest} was begun with {name} {found}, and {self.row.name} has {wanted}: move that run away, or "
                f"go on with it by --{name}"
            )
        return checkpoint.step

    def is_done(self) -> bool:
        result = read_result(self.row.name)
        if result is None or tested_checkpoint(result) != self.row.tested:
            return False
        return result["steps"] >= self.settings.steps

    def start(self, part: str, environment: dict[str, str]) -> None:
        """`part` is "train" or "test"; all that it prints goes to the run's tables.log."""
        train = part == "train"
        # A checkpoint that was packed on another machine must not decide on these.
        here = ["run", "data_dir", "model_dir", "log_dir", "device"]
        names = [*here, "steps", *RECIPE, *self.overrides] if train else PLACES
        what = ["-p", self.row.preset] if train else ["-m", f"{self.row.name}/{self.row.tested}"]
        what += _to_words({name: getattr(self.settings, name) for name in names})
        path = self.settings.log_path / "tables.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            command = [sys.executable, str(ROOT / "config" / "main.py"), "-a", part, *what]
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        self.part = part

    def is_stopped(self, asked: bool) -> bool:
        """Whether the process, which has ended, left work behind, now that all were `asked` to end or were not."""
        if self.part == "test":
            return bool(self.process.returncode)
        return asked or self.step < self.settings.steps

    def last_line(self) -> str:
        lines = (self.settings.log_path / "tables.log").read_text(errors="replace").splitlines()
        return lines[-1] if lines else "without a word"


def run_rows(
    rows: list[Row], overrides: dict[str, Any], jobs: int, minutes: float, archive: packing.Archive | None = None
) -> bool:
    """Train and test what is missing of `rows`, `jobs` at once; whether all have a result now.

    After `minutes` (0: never), on Ctrl-C or SIGTERM, the trainings save and stop; the next call goes on with them. The
    archive is kept current meanwhile.
    """
    waiting = [job for job in (Job(row, overrides) for row in rows) if not _told_done(job)]
    running: list[Job] = []
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    environment = dict(os.environ)
    if "OMP_NUM_THREADS" not in environment:
        environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // jobs))
    missed = []
    told = False
    with Interrupt() as stop:
        while running or (waiting and not stop.requested):
            if time.monotonic() > end and not stop.requested:
                log.info(f"{minutes:g} minutes are over")
                stop.requested = True
            if stop.requested and not told:
                told = True
                for job in running:
                    job.process.terminate()
            while waiting and len(running) < jobs and not stop.requested:
                job = waiting.pop(0)
                log.info(f"{job.row.name}: from step {job.step} to {job.settings.steps}")
                job.start("train", environment)
                running.append(job)
            time.sleep(0.2)
            if archive:
                archive.keep_current()
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                if job.process.returncode and not stop.requested:
                    missed.append(job)
                    log.warning(f"{job.row.name}: {job.part} ended with {job.last_line()!r}")
                elif job.is_stopped(stop.requested):
                    missed.append(job)
                    log.info(f"{job.row.name}: stopped at step {job.step} of {job.settings.steps}")
                elif job.part == "test":
                    result = write_result(job.row, job.settings)
                    log.info(f"{job.row.name}: {_scores(result)}, {RESULTS / job.row.name}.json")
                else:
                    job.start("test", environment)
                    running.append(job)
    if archive:
        archive.write()
        log.info(f"{archive.path} holds {', '.join(archive.contents) or 'no run yet'}")
    if waiting:
        log.info(f"not begun: {', '.join(job.row.name for job in waiting)}")
    return not (waiting or missed)


def _told_done(job: Job) -> bool:
    if job.is_done():
        log.info(f"{job.row.name}: has its result already, {_scores(read_result(job.row.name))}")
        return True
    return False


# ---------------------------------------------------------------- packing


def find_run(overrides: dict[str, Any]) -> packing.Find:
    """What gives the run of a row's name, with its folders here."""

    def find(name: str) -> packing.Run | None:
        row = row_of(name)
        return row and packing.Run(row.settings(overrides), row.tested == "best", RECIPE)

    return find


def open_archive(path: Path, rows: list[Row], overrides: dict[str, Any]) -> packing.Archive:
    """The archive that the runs of `rows` are packed into. Raises UserError as `packing.Archive` does."""
    find = find_run(overrides)
    return packing.Archive(path, [find(row.name) for row in rows], find)


def pack(path: Path, overrides: dict[str, Any]) -> None:
    """Pack every run of a row that lies in model_dir. Raises UserError where there is none."""
    rows = rows_with_runs(overrides)
    if not rows:
        raise UserError(f"{resolve(overrides=overrides).model_dir} has no run of a row")
    archive = open_archive(path, rows, overrides)
    archive.write()
    log.info(f"{path} holds {', '.join(archive.contents)}")


def rows_with_runs(overrides: dict[str, Any]) -> list[Row]:
    """The rows whose run lies in model_dir."""
    states = sorted(Path(resolve(overrides=overrides).model_dir).glob("*/latest.pth"))
    return [row for path in states if (row := row_of(path.parent.name))]


# ---------------------------------------------------------------- showing


def last_stage(result: dict[str, Any]) -> dict[str, float]:
    """The scores of the image that a user gets."""
    return list(result["test"].values())[-1]


def _scores(result: dict[str, Any]) -> str:
    return f"{last_stage(result)['psnr']:.2f} dB / {last_stage(result)['ssim']:.4f} after {result['steps']} steps"


def list_rows(overrides: dict[str, Any]) -> None:
    """Print every row with its state; rows of other recipes and seeds where they have a result or a run."""
    others = [row_of(path.stem) for path in sorted(RESULTS.glob("*.json"))]
    rows = dict.fromkeys([*all_rows(), *filter(None, others), *rows_with_runs(overrides)])
    log.info(f"{'row':32}{'paper':>16}  state")
    for row in rows:
        result = read_result(row.name)
        if result:
            state = _scores(result)
        else:
            state = _state(Job(row, overrides))
        log.info(f"{row.name:32}{row.paper:>16}  {state}")


def _state(job: Job) -> str:
    try:
        return f"step {job.step} of {job.settings.steps}" if job.step else "no run"
    except UserError as error:
        return str(error)


def markdown(in_full: bool = True) -> str:
    """The paper's tables with what results there are: all, as results/README.md shows them, or the README's choice."""
    found: dict[Row, list[dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("*.json")):
        result = read_result(path.stem)
        if "preset" in result:
            found.setdefault(Row(result["preset"], result["data"]), []).append(result)
    text = [line for title, presets in TABLES.items() for line in _table(title, presets, found, in_full)]
    return "\n".join([*text, *_studies()])


def _table(
    title: str, presets: tuple[str, ...], found: dict[Row, list[dict[str, Any]]], in_full: bool
) -> Iterator[str]:
    """The lines of a table; none where it would be empty."""
    lines = []
    rows = [Row(preset, data) for preset in presets for data in DATA]
    short = {row.data for row in rows if row in found and not any(map(is_full, found[row]))}  # sets with such rows
    for row in rows:
        results = found.get(row, [])
        if not in_full and row.data not in short:  # else the short runs are what can be compared
            results = [result for result in results if is_full(result)]
        cells = [_cells(result, row.paper) for result in results]
        if in_full and not results:
            cells = [["no run yet", "", row.paper, "", "", "", f"`{row.name}`"]]
        start = [PRESETS[row.preset].row.split(",")[0], DATA[row.data]]
        lines += ["| " + " | ".join([*start, *line]) + " |" for line in cells]
    if lines:
        yield f"**{title}**\n"
        yield "| row | data | PSNR | SSIM | in the paper | steps x crops | tested on | trained on | run |"
        yield "|---|---|---|---|---|---|---|---|---|"
        yield from lines
        yield ""


def is_full(result: dict[str, Any]) -> bool:
    """Whether a result reproduces a row of the paper: all steps and crops, its recipe, the last step's weights."""
    row, settings = Row(result["preset"], result["data"], seed=result["seed"]), result["settings"]
    whole = row.settings({})
    if result["steps"] < whole.steps or tested_checkpoint(result) != row.tested:
        return False
    return all(settings[name] == _listed(getattr(whole, name)) for name in RECIPE)


def _studies() -> Iterator[str]:
    """What studies.py left, with the commands that made it."""
    tilt = read_result("tilt")
    if tilt:
        runs = (f"{run} ({facts['steps']} steps x {facts['batch_size']})" for run, facts in tilt["runs"].items())
        yield (
            f"**Tilted rain**: {tilt['rain']} rain turned about {tilt['images']} backgrounds; {', '.join(runs)}\n\n"
            f"{studies.tilt_markdown(tilt)}\n\n"
            f"`python config/main.py -a tilt -m {' '.join(tilt['runs'])} --rain {tilt['rain']}`\n"
        )
    for path in sorted(RESULTS.glob("stages_*.json")):
        result = read_result(path.stem)
        yield (
            f"**By stage**: `{result['model']}` after {result['step']} steps, {result['images']} images of "
            f"{result['data']}, on {result['device']}\n\n"
            f"{studies.stages_markdown(result)}\n\n"
            f"`python config/main.py -a stages -m {result['model']}`\n"
        )


def _cells(result: dict[str, Any], paper: str) -> list[str]:
    settings, scores = result["settings"], last_stage(result)
    name = Row(result["preset"], result["data"], result["recipe"], result["seed"]).name
    steps = f"{result['steps']} x {settings['batch_size']}"
    if not is_full(result):
        steps = f"*{steps}: no reproduction*"
    images = f"{result['test_images']} images"
    return [f"{scores['psnr']:.2f}", f"{scores['ssim']:.4f}", paper, steps, images, result["train_rain"], f"`{name}`"]


def _listed(value: Any) -> Any:
    """A value as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


BEGIN, END = "<!-- tables: made by `python config/main.py -a tables --write` -->\n", "<!-- end of tables -->"


def write_tables() -> None:
    """Put the tables between the marks in README and page. Raises UserError where one of these has none."""
    texts = {path: _with_tables(path, in_full) for path, in_full in ((README, False), (PAGE, True))}
    for path, text in texts.items():
        write_bytes(path, text.encode())
        log.info(f"the tables in {path} are those of {RESULTS}")


def _with_tables(path: Path, in_full: bool) -> str:
    """The text of a file with the tables between its marks."""
    text = path.read_text() if path.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"{path} has not exactly one {BEGIN.strip()!r} with {END!r} behind it: nothing was changed")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{markdown(in_full)}\n{END}{after}"


def main(words: list[str]) -> int:
    """What `-a tables` does with the rest of the command line; returns the exit status."""
    parser = Parser(
        prog="main.py -a tables", description="The rows of the paper's tables: list, run, pack, render them."
    )
    parser.add_argument("--run", nargs="+", metavar="NAME", help="rows to train and test, or `all`")
    parser.add_argument("--jobs", type=int, default=1, help="rows at once; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=0.0, help="save and stop after so many; default: no end")
    parser.add_argument("--take", type=Path, metavar="FILE", help="first unpack the runs of an archive")
    what = "archive of what runs resume from: those of --run, kept current while they run; without --run, of all"
    parser.add_argument("--pack", type=Path, metavar="FILE", help=what)
    parser.add_argument("--write", action="store_true", help="write the tables of README.md and results/README.md")
    known, rest = parser.parse_known_args(words)
    if known.jobs < 1 or known.minutes < 0:
        raise UserError(f"--jobs must be at least 1 and --minutes at least 0, got {known.jobs} and {known.minutes:g}")
    overrides = read_overrides(rest)
    for name in overrides:
        if name in ("run", "seed", *NETWORK_FIELDS):
            raise UserError(f"--{name} is the row's own: choose another row")
    status = 0
    rows = all_rows() if known.run == ["all"] else [find_row(name) for name in known.run or ()]
    if known.take:
        packing.take(known.take, find_run(overrides))
    if known.run:
        archive = open_archive(known.pack, rows, overrides) if known.pack else None
        status = 0 if run_rows(rows, overrides, known.jobs, known.minutes, archive) else 1
    elif known.pack:
        pack(known.pack, overrides)
    if known.write:
        write_tables()
    if not (known.run or known.take or known.pack or known.write):
        list_rows(overrides)
    return status

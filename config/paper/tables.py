"""Result files, what a row's training and test leave in results/NAME.json, and the tables rendered from them."""

import csv
import json
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from base.console import log
from base.errors import DamagedFile
from base.files import ROOT, write_bytes, write_json
from cal_ssim import METRICS
from paper.rows import DATA_SETS, RECIPE_FIELDS, TABLES, Row, Run, all_rows, find_run
from runs import checkpoints
from settings import Settings, map_paths, to_dict

FOLDER = ROOT / "results"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "RESULTS.md"
START, END = "<!-- tables: made by `python config/main.py -a tables --write` -->\n", "<!-- end of tables -->"
Result = dict[str, Any]


def read_results() -> dict[str, Result]:
    """All results by name, sorted by it. Raises DamagedFile where a file is not JSON."""
    results = {}
    for path in sorted(FOLDER.glob("*.json")):
        try:
            results[path.stem] = json.loads(path.read_text())
        except ValueError:
            raise DamagedFile(f"{path} is not JSON: remove it and run the row again") from None
    return results


def write_result(name: str, result: Result) -> Path:
    """Write a result; returns its file."""
    path = FOLDER / f"{name}.json"
    write_json(path, result)
    return path


def collect(run: Run) -> Result:
    """The result of a row, from the checkpoint, log and scores that its training and test have left."""
    row, settings, checkpoint = run.row, run.settings, checkpoints.load(run.file("latest.pth"))
    with open(run.file(f"test_{row.checkpoint}.csv")) as file:
        images = list(csv.DictReader(file))
    return {
        **row._asdict(),
        "steps": checkpoint.step,
        "tested": row.checkpoint,
        "seconds": round(checkpoint.seconds, 1),
        "device": checkpoint.device,
        "versions": {**checkpoint.versions, "code": _code_version()},
        "train_rain": _train_rain(settings),
        "test_images": len(images),
        "test": mean_scores(images),
        "validation": validation_curve(run.file("train.log").read_text(errors="replace")),
        # Only the last part of each path: the rest says something about one machine.
        "settings": {**to_dict(settings), **map_paths(settings, lambda path: Path(path).name)},
    }


def mean_scores(images: list[dict[str, str]]) -> dict[str, dict[str, float]]:
    """{"input" or "stage_t": {metric: mean}} of the rows of a test's CSV, without images too small for SSIM."""

    def mean(column: str) -> float:
        return round(float(np.nanmean([float(image[column]) for image in images])), 4)

    places = [column.removeprefix("psnr_") for column in images[0] if re.fullmatch(r"psnr_(input|stage_\d+)", column)]
    return {place: {metric: mean(f"{metric}_{place}") for metric in METRICS} for place in places}


def _train_rain(settings: Settings) -> str:
    if settings.rain:
        return f"synthetic: {settings.rain}"
    record = Path(settings.data_dir) / "train" / "drawn.txt"  # that rain.py writes beside its pairs: "...: STYLE, ..."
    if record.is_file():
        return f"synthetic:{record.read_text().rstrip().partition(':')[2]}"
    return "as in the data set"


def validation_curve(text: str) -> list[list[float]]:
    """[step, PSNR in dB, SSIM] of each validation in a train.log; of a step that was repeated, the last."""
    pattern = r"validation at step (\d+): psnr by stage .*?(\d+\.\d+) dB .*?ssim (\d+\.\d+)"
    found = {int(step): [int(step), float(psnr), float(ssim)] for step, psnr, ssim in re.findall(pattern, text)}
    return [found[step] for step in sorted(found)]


def _code_version() -> str:
    """What git calls this state of the code; "unknown" where there is no git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def is_full(result: Result) -> bool:
    """Whether a result reproduces a row of the paper: its recipe, all steps, the last step's weights."""
    row = Row(result["preset"], result["data"], seed=result["seed"])
    recipe = json.loads(json.dumps(to_dict(find_run(row, {}).settings)))  # tuples become lists
    unchanged = all(result["settings"].get(name) == recipe[name] for name in RECIPE_FIELDS)
    return unchanged and result["steps"] >= recipe["steps"] and result["tested"] == row.checkpoint


def last_scores(result: Result) -> tuple[str, str]:
    """PSNR and SSIM of the last stage, whose output a user gets, as they are printed."""
    scores = list(result["test"].values())[-1]
    return f"{scores['psnr']:.2f}", f"{scores['ssim']:.4f}"


def table(columns: list[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head, *lines = (f"| {' | '.join(line)} |" for line in (columns, *rows))
    return "\n".join([head, "|---" * len(columns) + "|", *lines])


def compact() -> str:
    """One table of the rows that have a run of the paper's recipe, as README.md shows them."""
    results, rows = read_results().values(), []
    for row in all_rows():
        for result in filter(is_full, _results_of(row, results)):
            label = row.label + (f", seed {result['seed']}" if result["seed"] else "")
            rows.append([label, DATA_SETS[row.data], " / ".join(last_scores(result)), row.paper_scores])
    return table(["row", "data", "here: PSNR / SSIM", "in the paper"], rows)


def full() -> str:
    """All tables of the paper, with the rows that have no run, then the tilt study, as docs/RESULTS.md shows them."""
    results = read_results()
    columns = ["row", "data", "PSNR", "SSIM", "in the paper", "steps x crops", "tested on", "trained on", "run"]
    parts = []
    for title, presets in TABLES.items():
        rows = [
            line for preset in presets for data in DATA_SETS for line in _lines(Row(preset, data), results.values())
        ]
        parts.append(f"**{title}**\n\n{table(columns, rows)}")
    if "tilt" in results:
        parts.append(_tilt_study(results["tilt"]))
    return "\n\n".join(parts)


def _results_of(row: Row, results: Iterable[Result]) -> list[Result]:
    return [result for result in results if (result.get("preset"), result.get("data")) == (row.preset, row.data)]


def _lines(row: Row, results: Iterable[Result]) -> Iterator[list[str]]:
    """A row's line for each of its results; where there are none, one that says so."""
    start = [row.label, DATA_SETS[row.data]]
    own = _results_of(row, results)
    if not own:
        yield [*start, "no run yet", "", row.paper_scores, "", "", "", f"`{row.name}`"]
    for result in own:
        run = row._replace(recipe=result["recipe"], seed=result["seed"])
        steps = f"{result['steps']} x {result['settings']['batch_size']}"
        steps = steps if is_full(result) else f"*{steps}: no reproduction*"
        rest = [row.paper_scores, steps, f"{result['test_images']} images", result["train_rain"], f"`{run.name}`"]
        yield [*start, *last_scores(result), *rest]


def _tilt_study(result: Result) -> str:
    """PSNR by angle, and the worst angle's less that at 0 degrees; with the command that made it."""
    angles, upright = result["angles"], result["angles"].index(0)
    rows = [
        [name, *(f"{value:.2f}" for value in psnr), f"{min(psnr) - psnr[upright]:+.2f}"]
        for name, psnr in result["psnr"].items()
    ]
    runs = (f"{run} ({facts['steps']} steps x {facts['batch_size']})" for run, facts in result["runs"].items())
    return (
        f"**Tilted rain**: {result['rain']} rain, turned, on {result['images']} backgrounds; {', '.join(runs)}\n\n"
        f"{table(['PSNR at', *(f'{angle}°' for angle in angles), 'worst less 0°'], rows)}\n\n"
        f"`python config/main.py -a tilt -m {' '.join(result['runs'])} --rain {result['rain']}`"
    )


def write_tables() -> None:
    """Put the tables between the marks in README and PAGE. Raises DamagedFile where one has no such marks."""
    for path, tables in ((README, compact()), (PAGE, full())):
        text = path.read_text() if path.is_file() else ""
        if text.count(START) != 1 or text.count(END) != 1:
            raise DamagedFile(f"{path} must have one line {START.strip()!r} and behind it one {END!r}")
        before, rest = text.split(START)
        write_bytes(path, f"{before}{START}\n{tables}\n\n{END}{rest.split(END)[1]}".encode())
        log.info(f"wrote the tables in {path}")

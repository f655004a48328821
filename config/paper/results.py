"""Result files: what a row's training and test leave in results/NAME.json."""

import csv
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from base.errors import DamagedFile
from base.files import ROOT, write_json
from cal_ssim import METRICS
from paper.rows import RECIPE_FIELDS, Row, Run, find_run
from runs import checkpoints
from settings import Settings, map_paths, to_dict

FOLDER = ROOT / "results"
Result = dict[str, Any]


def read_result(name: str) -> Result | None:
    """The result called `name`; None where there is none. Raises DamagedFile where the file is not JSON."""
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise DamagedFile(f"{path} is not JSON: remove it and run the row again") from None


def read_results(pattern: str = "*") -> dict[str, Result]:
    """All results whose names match a pattern, by name and sorted by it. Raises DamagedFile as `read_result` does."""
    return {path.stem: read_result(path.stem) for path in sorted(FOLDER.glob(f"{pattern}.json"))}


def write_result(name: str, result: Result) -> Path:
    """Write a result; returns its file."""
    path = FOLDER / f"{name}.json"
    write_json(path, result)
    return path


def collect(run: Run) -> Result:
    """The result of a row, from the checkpoint, log and scores that its training and test have left."""
    row, settings, checkpoint = run.row, run.settings, checkpoints.load(run.latest)
    with open(settings.log_path / f"test_{row.checkpoint}.csv") as file:
        images = list(csv.DictReader(file))
    return {
        **row._asdict(),
        "steps": checkpoint.step,
        "tested": row.checkpoint,
        "seconds": round(checkpoint.seconds, 1),
        "device": checkpoint.device,
        "versions": {**checkpoint.versions, "code": code_version()},
        "train_rain": _train_rain(settings),
        "test_images": len(images),
        "test": mean_scores(images),
        "validation": validation_curve((settings.log_path / "train.log").read_text(errors="replace")),
        # Only the last part of each path: the rest says something about one machine.
        "settings": {**to_dict(settings), **map_paths(settings, lambda path: Path(path).name)},
    }


def mean_scores(images: list[dict[str, str]]) -> dict[str, dict[str, float]]:
    """{"input" or "stage_t": {metric: mean}} of the rows of a test's CSV, without images too small for SSIM."""
    places = [match[1] for column in images[0] if (match := re.fullmatch(r"psnr_(input|stage_\d+)", column))]
    return {
        place: {
            metric: round(float(np.nanmean([float(image[f"{metric}_{place}"]) for image in images])), 4)
            for metric in METRICS
        }
        for place in places
    }


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


def code_version() -> str:
    """What git calls this state of the code; "unknown" where there is no git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def is_full(result: Result) -> bool:
    """Whether a result reproduces a row of the paper: its recipe, all steps, the last step's weights."""
    row = Row(result["preset"], result["data"], seed=result["seed"])
    whole = to_dict(find_run(row, {}).settings)
    if result["steps"] < whole["steps"] or result["tested"] != row.checkpoint:
        return False
    recipe = json.loads(json.dumps({name: whole[name] for name in RECIPE_FIELDS}))  # tuples become lists
    return all(result["settings"].get(name) == value for name, value in recipe.items())


def last_scores(result: Result) -> dict[str, float]:
    """The scores of the last stage, whose output a user gets."""
    return list(result["test"].values())[-1]


def describe_result(result: Result) -> str:
    scores = last_scores(result)
    return f"{scores['psnr']:.2f} dB / {scores['ssim']:.4f} after {result['steps']} steps"

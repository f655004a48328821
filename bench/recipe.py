"""What was tried for the recipe `best`: short trainings from one start, in one thing unlike, and their validation.

    python bench/recipe.py -m START --data_dir data/rain800                # all trials, one after another
    python bench/recipe.py -m START --data_dir data/rain800 --only ssim flip

START is a checkpoint of S-DSEN with weights alone (main.py -a export). Every trial is a run try_NAME of main.py that
goes on where it was stopped. What came of it goes to results/tried.json, and `main.py -a tables --write` shows it in
results/README.md. Words that are none of the arguments below go to all trainings.
"""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "config"))

import settings as knobs
import studies
import tables
from common import ROOT, Parser, UserError, log, run_script, set_up_log

COMMON = (
    "--stage_num 2 --batch_size 4 --loss ssim_l1 --clip_norm 1 --lr 5e-4 --warmup 20 --average 0.98 --steps 300 "
    "--save_steps 150 --val_images 10 --precision bf16"
).split()
TRIALS = {  # beside COMMON
    "ssim_l1": "",
    "ssim": "--loss ssim",
    "mse": "--loss mse --clip_norm 0.1",
    "charbonnier": "--loss charbonnier --clip_norm 0.1",
    "last": "--loss_stages last",
    "flip": "--aug_data flip",
    "cosine": "--schedule cosine",
    "no_average": "--average 0",
    "patch96": "--patch_size 96 --batch_size 2",
}


def main(arguments: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("-m", "--model", required=True, help="the checkpoint that every trial starts from")
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS), help="default: all")
    known, rest = parser.parse_known_args(arguments)
    set_up_log()
    for name in known.only:
        words = [*COMMON, *TRIALS[name].split(), *rest]
        settings = knobs.resolve(overrides=knobs.read_overrides([*words, "--run", f"try_{name}"]))
        train(known.model, words, settings)
        write_result(name, settings)


def train(start: str, words: list[str], settings: knobs.Settings) -> None:
    """One trial, or what is left of it. Raises UserError where it does not come to its end."""
    begun = (settings.model_path / "latest.pth").is_file()
    command = [sys.executable, str(ROOT / "config" / "main.py"), "-a", "train", f"--run={settings.run}", *words]
    if subprocess.run([*command, *([] if begun else ["-m", os.path.abspath(start)])]).returncode:
        raise UserError(f"the trial {settings.run} failed")


def write_result(name: str, settings: knobs.Settings) -> None:
    """Put the last validation of a trial into results/tried.json."""
    path = studies.RESULTS / "tried.json"
    found = tables.read_result("tried") or {}
    step, psnr, ssim = tables.validation_curve((settings.log_path / "train.log").read_text())[-1]
    found[name] = {
        "differences": TRIALS[name],
        "common": " ".join(COMMON),
        "data": Path(settings.data_dir).name,
        "step": step,
        "psnr": psnr,
        "ssim": ssim,
    }
    studies.write_json(path, {key: found[key] for key in TRIALS if key in found})
    log.info(f"{name}: {psnr:.2f} dB / {ssim:.4f}, {path}")


if __name__ == "__main__":
    run_script(main)

"""What whole trainings take, and what bf16 does to their results and to a trained network's images.

    python bench/trainings.py run --device cuda --steps 1000      # seconds of the paper's training, from a part of it
    python bench/trainings.py curve --device cuda --steps 2000    # PSNR by step, float32 beside bf16
    python bench/trainings.py outputs --device cuda -m sdsen_rain800    # images in bf16 against float32

Trainings run through main.py in processes of their own, on the built-in set unless --data_dir names another, and leave
nothing behind. Words that are none of the arguments below go to main.py: `curve --batch_size 4 -p dsen`.
"""

import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "config"))

import torch

from cal_ssim import psnr
from common import ROOT, Parser, UserError, run_script
from dataset import data_path, list_pairs, read_whole
from devices import pick_device
from evaluate import open_network, restore

PAPER_STEPS = 20000
SAVE_STEPS = 500  # main.py's, for the paper's training


def start_training(folder: Path, name: str, words: list[str]) -> subprocess.Popen:
    """main.py -a train in a process of its own, which writes to `folder`."""
    command = [sys.executable, str(ROOT / "config" / "main.py"), "-a", "train", f"--run={name}", *words]
    command += ["--model_dir", str(folder / "models"), "--log_dir", str(folder / "logs")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> list[str]:
    """The lines of a training that ends well. Raises UserError with its last line where it does not."""
    lines = process.communicate()[0].splitlines()
    if process.returncode:
        raise UserError(f"the training failed: {lines[-1] if lines else 'without a word'}")
    return lines


def validation_psnr(lines: list[str]) -> dict[int, float]:
    """{step: PSNR of the last stage, dB} of a training's lines."""
    found = (re.match(r"validation at step (\d+): psnr by stage .*?([\d.]+) dB", line) for line in lines)
    return {int(match[1]): float(match[2]) for match in found if match}


def project(lines: list[str], seconds: float, batch_size: int, save_steps: int = SAVE_STEPS) -> dict[str, float]:
    """From the lines of a part of a training, which took `seconds`, what the paper's whole training would take.

    All values in seconds: `start` is what comes before the steps and behind them, `step` and `validation` are medians.
    """
    steps = [line for line in lines if line.startswith("step ")]
    rates = [float(re.search(r"([\d.]+) images/s", line)[1]) for line in steps]
    done = int(re.match(r"step (\d+)/", steps[-1])[1])
    validations = [float(line.split()[-2]) for line in lines if line.startswith("validation at step")]
    step = batch_size / statistics.median(rates[1:] or rates)
    validation = statistics.median(validations)
    start = max(0.0, seconds - done * step - sum(validations))
    whole = start + PAPER_STEPS * step + PAPER_STEPS // save_steps * validation
    return {"start": start, "step": step, "validation": validation, "whole": whole}


def run(words: list[str], steps: int, batch_size: int) -> None:
    """Print what `steps` steps take, and what the paper's 20000 would."""
    words = [
        *words,
        "--steps",
        str(steps),
        "--batch_size",
        str(batch_size),
        "--save_steps",
        str(min(SAVE_STEPS, steps)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        lines = finish(start_training(Path(folder), "run", words))
        seconds = time.perf_counter() - started
    numbers = project(lines, seconds, batch_size)
    last = next(line for line in reversed(lines) if line.startswith("step "))
    print(next(line for line in lines if line.startswith("run run")))
    print(f"{steps} steps of {batch_size} crops: {seconds:.1f} s in all; its last line: {last}")
    start, step, validation, whole = numbers.values()
    print(
        f"start {start:.1f} s, a step {1000 * step:.1f} ms, a validation {validation:.1f} s: {PAPER_STEPS} steps with "
        f"{PAPER_STEPS // SAVE_STEPS} validations would take {whole / 60:.1f} min"
    )


def curve(words: list[str], steps: int, batch_size: int) -> None:
    """Print the PSNR of the same training in float32 and in bf16, side by side, and how far they are apart."""
    words = [*words, "--steps", str(steps), "--batch_size", str(batch_size), "--save_steps", str(max(1, steps // 10))]
    words += ["--milestones", str(max(1, steps * 3 // 4)), str(max(2, steps * 7 // 8)), "--val_images", "0"]
    with tempfile.TemporaryDirectory() as folder:
        both = {p: start_training(Path(folder), p, [*words, "--precision", p]) for p in ("float32", "bf16")}
        curves = {precision: validation_psnr(finish(process)) for precision, process in both.items()}
    print(f"{'step':>8}{'float32, dB':>14}{'bf16, dB':>14}{'difference':>14}")
    differences = []
    for step, plain in curves["float32"].items():
        differences.append(curves["bf16"][step] - plain)
        print(f"{step:>8}{plain:>14.2f}{curves['bf16'][step]:>14.2f}{differences[-1]:>+14.2f}")
    print(f"largest difference {max(map(abs, differences)):.2f} dB, at the end {differences[-1]:+.2f} dB")


def compare_outputs(name: str, overrides: dict[str, str]) -> list[dict[str, float]]:
    """For each test image of the built-in set, what bf16 changes in the derained image of the last stage.

    `p999` and `max` are of the absolute difference to float32, in levels of 255; `psnr` that of bf16 less float32's;
    `device` is the largest difference of float32 on the device to float32 on the CPU, in [0, 1].
    """
    network, settings, _, _ = open_network(None, name, overrides)
    device = pick_device(settings.device)
    rows = []
    for path in list_pairs(data_path(settings) / "test"):
        O, B = (x.float() / 255 for x in read_whole(path))
        plain, half = (list(restore(network, O.to(device), precision=p))[-1].cpu() for p in ("float32", "bf16"))
        on_cpu = list(restore(network.cpu(), O, precision="float32"))[-1]
        network.to(device)
        difference = 255 * (half - plain).abs().flatten()
        rows.append(
            {
                "p999": difference.kthvalue(round(0.999 * difference.numel())).values.item(),
                "max": difference.max().item(),
                "psnr": (psnr(half[None], B[None]) - psnr(plain[None], B[None])).item(),
                "device": (plain - on_cpu).abs().max().item(),
            }
        )
    return rows


def outputs(name: str, overrides: dict[str, str]) -> None:
    """Print the worst of `compare_outputs`."""
    rows = compare_outputs(name, overrides)
    worst = {key: max(abs(row[key]) for row in rows) for key in rows[0]}
    print(
        f"{name}, {len(rows)} images, bf16 against float32: 99.9th percentile {worst['p999']:.2f} of 255 levels, "
        f"largest {worst['max']:.2f}, PSNR {worst['psnr']:.4f} dB; float32 against the CPU's: {worst['device']:.1e}"
    )


def main(arguments: list[str]) -> None:
    parser = Parser(description="What trainings take, and what bf16 changes.", epilog=__doc__.split("\n\n")[1])
    parser.add_argument("what", choices=["run", "curve", "outputs"])
    parser.add_argument("--device", default="auto", help="as main.py's; default: %(default)s")
    parser.add_argument("--steps", type=int, default=1000, help="of the training; default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=64, help="default: the paper's, %(default)s")
    parser.add_argument("-m", "--model", help="outputs: a checkpoint, as main.py takes it")
    known, words = parser.parse_known_args(arguments)
    if known.steps < 2:
        raise UserError(f"--steps must be at least 2, got {known.steps}")
    if known.what == "outputs":
        if not known.model or words:
            raise UserError("outputs takes -m CHECKPOINT and --device alone")
        with torch.inference_mode():
            outputs(known.model, {"device": known.device, "data_dir": ""})
    else:
        training = run if known.what == "run" else curve
        training(["--device", known.device, *words], known.steps, known.batch_size)


if __name__ == "__main__":
    run_script(main)

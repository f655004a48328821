"""How long whole trainings take, and what 16 bits change in their scores and in a trained network's images.

    python bench/trainings.py run --device cuda --steps 300      # time of the paper's training, from its first steps
    python bench/trainings.py curve --device cuda --steps 2000   # PSNR by step, float32 beside bf16
    python bench/trainings.py outputs --device cuda -m rain800    # images in 16 bits against float32

Trainings run through main.py in processes of their own, on the built-in set unless --data_dir names another, and leave
no files. Other arguments go to main.py: `curve --batch_size 4 -p dsen`.
"""

import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "config"))

import base.openmp  # noqa: F401

import report
from base.console import Parser, run_script
from base.errors import BadArgument, LostProcess
from base.files import ROOT
from report import Numbers
from settings import FIELDS

PAPER_STEPS = 20000
SAVE_STEPS = 500  # main.py's, for the paper's training
VALIDATIONS = 5  # points of a curve
FORMATS = tuple(name for name in FIELDS["precision"].choices if name != "float32")


def start_training(folder: Path, name: str, words: list[str]) -> subprocess.Popen:
    """main.py -a train in a process of its own, which writes to `folder`."""
    command = [sys.executable, str(ROOT / "config" / "main.py"), "-a", "train", f"--run={name}", *words]
    command += ["--model_dir", str(folder / "models"), "--log_dir", str(folder / "logs")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, read: Sequence[str] = ()) -> list[str]:
    """All lines of a training, of which some were `read`. Raises LostProcess with the last one where it failed."""
    lines = [*read, *process.communicate()[0].splitlines()]
    if process.returncode:
        raise LostProcess(f"the training failed: {lines[-1] if lines else 'no output'}")
    return lines


def validation_psnr(lines: list[str]) -> dict[int, float]:
    """{step: PSNR of the last stage, dB} of a training's lines."""
    found = (re.match(r"validation at step (\d+): psnr by stage .*?([\d.]+) dB", line) for line in lines)
    return {int(match[1]): float(match[2]) for match in found if match}


def project(lines: list[str], seconds: float, batch_size: int) -> dict[str, float]:
    """From the lines of a training up to its last validation, after `seconds`, what the paper's training would take.

    All values in seconds: `start` is what comes before the steps, `step` and `validation` are medians, without the
    first ones, which are slower.
    """
    rates = [float(re.search(r"([\d.]+) images/s", line)[1]) for line in lines if line.startswith("step ")]
    validations = [float(line.split()[-2]) for line in lines if line.startswith("validation at step")]
    step = batch_size / statistics.median(rates[1:] or rates)
    validation = statistics.median(validations[1:] or validations)
    start = max(0.0, seconds - max(validation_psnr(lines)) * step - sum(validations))
    whole = start + PAPER_STEPS * step + PAPER_STEPS // SAVE_STEPS * validation
    return {"start": start, "step": step, "validation": validation, "whole": whole}


def run(words: list[str], steps: int, batch_size: int) -> Numbers:
    """Print what the paper's training takes, of which `steps` steps and two validations are run."""
    own = {"steps": PAPER_STEPS, "batch_size": batch_size, "save_steps": steps // 2}
    own["log_steps"] = max(1, min(50, steps // 4))
    words = [*(f"--{name}={value}" for name, value in own.items()), *words]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        process, lines = start_training(Path(folder), "run", words), []
        while len(validation_psnr(lines)) < 2 and (line := process.stdout.readline()):
            lines.append(line.rstrip())
        seconds = time.perf_counter() - started
        process.send_signal(signal.SIGINT)  # it saves and ends
        finish(process, lines)
    numbers = project(lines, seconds, batch_size)
    print(f"{steps} steps of {batch_size} crops: {seconds:.1f} s; the last line:", lines[-1])
    start, step, validation, whole = numbers.values()
    print(
        f"start {start:.1f} s, a step {1000 * step:.1f} ms, a validation {validation:.1f} s: {PAPER_STEPS} steps with "
        f"{PAPER_STEPS // SAVE_STEPS} validations would take {whole / 60:.1f} min"
    )
    return numbers


def curve(words: list[str], steps: int, batch_size: int) -> Numbers:
    """Print the PSNR of the same training in float32 and in bf16, side by side, and how far they are apart."""
    own = {"steps": steps, "batch_size": batch_size, "save_steps": max(1, steps // VALIDATIONS), "val_images": 0}
    milestones = ["--milestones", str(max(1, steps * 3 // 4)), str(max(2, steps * 7 // 8))]
    words = [*(f"--{name}={value}" for name, value in own.items()), *milestones, *words]
    with tempfile.TemporaryDirectory() as folder:
        both = {p: start_training(Path(folder), p, [*words, "--precision", p]) for p in ("float32", "bf16")}
        curves = {precision: validation_psnr(finish(process)) for precision, process in both.items()}
    print(f"{'step':>8}{'float32, dB':>14}{'bf16, dB':>14}{'difference':>14}")
    differences = []
    for step, plain in curves["float32"].items():
        differences.append(curves["bf16"][step] - plain)
        print(f"{step:>8}{plain:>14.2f}{curves['bf16'][step]:>14.2f}{differences[-1]:>+14.2f}")
    largest, end = max(map(abs, differences)), differences[-1]
    print(f"largest difference {largest:.2f} dB, at the end {end:+.2f} dB")
    return {**curves, "largest": largest, "end": end}


def compare_outputs(
    name: str, overrides: dict[str, str], precision: str = "bf16", images: int | None = None
) -> list[dict[str, float]]:
    """Of each test image of the built-in set, or the first few, what 16 bits change in the last stage's output.

    `p999` and `max`: the absolute difference to float32, in levels of 255. `psnr`: that of `precision` less float32's.
    """
    import torch  # which takes seconds, and only this function needs it

    from base.devices import pick_device
    from cal_ssim import psnr
    from dataset import data_path, list_pairs, read_whole
    from runs.restore import Restoring, open_network, restore

    network, settings, _, _ = open_network(None, name, {**overrides, "precision": precision})
    device = pick_device(settings.device)
    rows = []
    for path in list_pairs(data_path(settings) / "test")[:images]:
        O, B = (x.to(device).float() / 255 for x in read_whole(path))
        with torch.inference_mode():
            plain, half = (list(restore(network, O, Restoring(precision=p)))[-1] for p in ("float32", precision))
        difference = 255 * (half - plain).abs().flatten()
        p999 = difference.kthvalue(round(0.999 * difference.numel())).values.item()
        change = (psnr(half[None], B[None]) - psnr(plain[None], B[None])).item()
        rows.append({"p999": p999, "max": difference.max().item(), "psnr": change})
    return rows


def outputs(name: str, overrides: dict[str, str], images: int | None) -> Numbers:
    """Print the worst of `compare_outputs` in each format."""
    numbers = {}
    for precision in FORMATS:
        rows = compare_outputs(name, overrides, precision, images)
        worst = numbers[precision] = {key: max(abs(row[key]) for row in rows) for key in rows[0]}
        print(
            f"{name}, {len(rows)} images, {precision} against float32: 99.9th percentile {worst['p999']:.2f} of 255 "
            f"levels, largest {worst['max']:.2f}, PSNR {worst['psnr']:.4f} dB",
            flush=True,
        )
    return numbers


def main(arguments: list[str]) -> None:
    parser = Parser(description="What trainings take, and what 16 bits change.", epilog=__doc__.split("\n\n")[1])
    parser.add_argument("what", choices=["run", "curve", "outputs"])
    parser.add_argument("--device", default="auto", help="as main.py's; default: %(default)s")
    parser.add_argument("--steps", type=int, default=1000, help="of the training; default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=64, help="default: the paper's, %(default)s")
    parser.add_argument("-m", "--model", help="outputs: a checkpoint, as main.py takes it")
    parser.add_argument("--images", type=int, help="outputs: how many test images; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the numbers to this file")
    known, words = parser.parse_known_args(arguments)
    if known.steps < 2:
        raise BadArgument(f"--steps must be at least 2, got {known.steps}")
    if known.what == "outputs":
        if not known.model or words:
            raise BadArgument("outputs takes -m CHECKPOINT, --device, --images and --json alone")
        places = {"device": known.device, "data_dir": ""}
        report.add(known.json, {"outputs": outputs(known.model, places, known.images)})
    else:
        training, key = (run, "paper") if known.what == "run" else (curve, "curve")
        report.add(known.json, {key: training(["--device", known.device, *words], known.steps, known.batch_size)})


if __name__ == "__main__":
    run_script(main)

"""The sections of the benchmark: each measures, and returns its numbers and a table to print."""

import json
import math
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

import convolutions
import model
from base.errors import LostProcess, UserError
from base.files import ROOT
from base.images import write_image
from dataset import CropDataset
from datasets.loader import training_batches
from runs import checkpoints
from runs.checkpoints import Checkpoint
from settings import Settings, override, resolve
from synthesis.streaks import add_rain
from synthesis.styles import STYLES
from timing import LEAST, Numbers, alternate, first_call, summary
from workloads import KINDS, SIDES, STEPS, make, variants_for

PRESET = "sdsen"
STEP_PRESETS = ("sdsen", "sdsen_s2", "dsen", "cnn")


@dataclass(frozen=True)
class Sizes:
    """What is measured, and for how long; the defaults are the paper's crops and a BSD photograph."""

    image: tuple[int, int] = (321, 481)  # height, width
    images: int = 16  # at once
    batch: int = 64
    patch: int = 64
    matrix: int = 8192  # side of the limits' matrices
    budget: float = 4.0  # seconds for the repeats of a kind, beside the warm-up

    def of(self, kind: str) -> tuple[int, ...]:
        """The size of a kind's inputs, as `workloads.make` takes it."""
        crops = (self.batch, self.patch)
        return {"inference": self.image, "images": (self.images, *self.image), "training": crops}[kind]


SIZES = {
    "cuda": Sizes(),
    "cpu": Sizes(batch=8, matrix=2048, budget=35.0),
    "rehearsal": Sizes((24, 36), 2, 2, 16, 256, 0.0),
}


@dataclass
class Job:
    """A call of the benchmark; `failed` names what did not work."""

    device: torch.device
    sizes: Sizes
    repeats: int | None = None
    limits: Numbers = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def settings(self, preset: str = PRESET) -> Settings:
        return resolve(preset, {"batch_size": self.sizes.batch, "patch_size": self.sizes.patch})

    def crops(self) -> str:
        return f"{self.sizes.batch} crops of {self.sizes.patch}x{self.sizes.patch}"

    def make(self, kind: str, name: str, preset: str = PRESET) -> Callable[[], Any]:
        return make(kind, name, self.settings(preset), self.device, self.sizes.of(kind))

    def alternate(self, runs: dict[str, Callable]) -> dict[str, list[float]]:
        return alternate(runs, self.device, self.repeats, self.sizes.budget, settle=True)

    def attempt(self, what: str, measure: Callable) -> Any:
        """What `measure()` returns; None where it fails, which is printed and noted."""
        try:
            return measure()
        except Exception as error:
            print(f"{what}: {error}" if isinstance(error, UserError) else f"{what}:\n{traceback.format_exc()}")
            self.failed.append(what)

    def peak(self, kind: str, name: str, first: Numbers) -> Numbers:
        """The memory of the `first` call; on a CPU, where that needs a fresh process, of a call in such a one."""
        if self.device.type == "cuda":
            return first
        rehearse = ["--rehearse"] if self.sizes is SIZES["rehearsal"] else []
        return json.loads(run_command([str(Path(__file__).with_name("bench.py")), "--peak", kind, name, *rehearse]))


def run_command(arguments: list[str]) -> str:
    """The standard output of Python with these arguments. Raises LostProcess with its last line where it fails."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise LostProcess(f"{' '.join(arguments)} failed: {last}")
    return done.stdout


def table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    """A title with the heads of the columns, and lines of a label and right-aligned cells."""
    lines = [[title, *columns], *([f"  {label}", *cells] for label, *cells in rows)]
    width = max(46, len(title))
    return "\n".join(f"{label:{width}}" + "".join(f"{cell:>24}" for cell in cells) for label, *cells in lines)


# ---------------------------------------------------------------- this code beside the reference


def nominal_gflop(preset: str, pixels: int) -> float:
    return 2e-9 * pixels * model.build(preset).macs_per_pixel()


def compare(kind: str, job: Job) -> tuple[Numbers, str]:
    """Both sides' times of a kind, their memory, and how far they agree."""
    runs = {side: job.make(kind, side) for side in SIDES}
    first = {side: first_call(run, job.device) for side, run in runs.items()}
    numbers: Numbers = {side: summary(s) for side, s in job.alternate(runs).items()}
    numbers["peaks"] = {side: job.peak(kind, side, numbers) for side, (_, numbers) in first.items()}
    size = job.sizes.of(kind)
    pixels = 3 * size[0] * size[1] ** 2 if kind == "training" else math.prod(size)  # a step counts as three forwards
    numbers["nominal_gflop"] = nominal_gflop(PRESET, pixels)
    numbers["speedup"] = numbers["reference"]["median"] / numbers["this code"]["median"]
    plain, here = (result for result, _ in first.values())
    if kind == "training":
        numbers["difference"] = abs(plain - here) / abs(plain)
    else:
        numbers["difference"] = max((a - b).abs().max().item() for a, b in zip(plain, here, strict=True))
    of = "relative difference of the loss" if kind == "training" else "largest difference of the stages' outputs"
    rows = [*compare_rows(numbers, job.limits), [of, "", f"{numbers['difference']:.1e}"]]
    inputs = job.crops() if kind == "training" else "x".join(map(str, size[::-1]))
    return numbers, table(f"{kind}: {PRESET}, {inputs}", [*SIDES, "ratio"], rows)


def compare_rows(numbers: Numbers, limits: Numbers) -> list[list[str]]:
    def both(label: str, text: Callable[[Numbers], str]) -> list[str]:
        return [label, *(text(numbers[side]) for side in SIDES)]

    gflop, peaks = numbers["nominal_gflop"], numbers["peaks"]
    less = peaks["reference"]["added"] / max(1, peaks["this code"]["added"])
    return [
        [*both("median, s", lambda n: f"{n['median']:.3f}"), f"{numbers['speedup']:.2f} times faster"],
        both("min .. max, s (repeats)", lambda n: f"{n['min']:.3f} .. {n['max']:.3f} ({len(n['seconds'])})"),
        both("nominal GFLOP/s", lambda n: f"{gflop / n['median']:.1f}"),
        both("  share of float32's matrix product", lambda n: f"{gflop / n['median'] / limits['gflops']:.1%}"),
        both("  share of bf16's matrix product", lambda n: f"{gflop / n['median'] / limits['gflops_bf16']:.1%}"),
        ["peak memory added, MiB", *(_mib(peaks[side]["added"]) for side in SIDES), f"{less:.2f} times less"],
        ["  to that of imports and network, MiB", *(_mib(peaks[side]["before"]) for side in SIDES)],
    ]


def _mib(count: float) -> str:
    return f"{count / 2**20:.0f}"


# ---------------------------------------------------------------- variants of a training step

STEP_COLUMNS = ["ms per step", "nominal TFLOP/s", "first step, s", "memory added, MiB"]


def measure_steps(job: Job, preset: str, names: Sequence[str]) -> Numbers:
    """Of each variant: seconds of a step, nominal TFLOP/s, and the `first_call`. A variant that fails is left out.

    The variants are timed in turn, each once untimed before.
    """

    def start(name: str) -> tuple[Callable, Numbers]:
        run = job.make("training", name, preset)
        return run, first_call(run, job.device)[1]

    started = {name: job.attempt(f"{preset}, {name}", partial(start, name)) for name in names}
    started = {name: both for name, both in started.items() if both}
    seconds = job.alternate({name: run for name, (run, _) in started.items()})
    gflop = nominal_gflop(preset, 3 * job.sizes.batch * job.sizes.patch**2)
    return {
        name: {**summary(s), "tflops": 1e-3 * gflop / summary(s)["median"], "first": started[name][1]}
        for name, s in seconds.items()
    }


def step_rows(label: str, numbers: Numbers, with_memory: bool) -> list[list[str]]:
    return [
        [
            f"{label}{name}",
            f"{1000 * n['median']:.2f}",
            f"{n['tflops']:.2f}",
            f"{n['first']['seconds']:.1f}",
            _mib(n["first"]["added"]) if with_memory else "-",
        ]
        for name, n in numbers.items()
    ]


def steps(job: Job) -> tuple[Numbers, str]:
    """Training steps of several networks, as fast as the device does them; on a CPU without the memory."""
    numbers = {preset: measure_steps(job, preset, STEPS[job.device.type]) for preset in STEP_PRESETS}
    on_gpu = job.device.type == "cuda"
    rows = [row for preset, found in numbers.items() for row in step_rows(f"{preset}, ", found, on_gpu)]
    return numbers, table(f"training step: {job.crops()}", STEP_COLUMNS, rows)


def variants(job: Job) -> tuple[Numbers, str]:
    """All variants of a training step."""
    numbers = measure_steps(job, PRESET, variants_for(job.device))
    for name, row in numbers.items():
        row["first"] = {**row["first"], "added": job.peak("training", name, row["first"])["added"]}
    return numbers, table(f"training step: {PRESET}, {job.crops()}", STEP_COLUMNS, step_rows("", numbers, True))


# ---------------------------------------------------------------- start-up, data, convolutions


def startup(job: Job) -> tuple[Numbers, str]:
    """Seconds of `show.py` on one small image, and of importing torch alone, which is most of it."""
    with tempfile.TemporaryDirectory() as folder:
        settings = resolve("sdsen_s2", {"model_dir": folder, "show_dir": str(Path(folder, "show"))})
        path = Path(folder, "random", "latest.pth")
        checkpoints.save(path, Checkpoint(model.build(settings).state_dict(), 0, settings))
        image = Path(folder, "small.png")
        write_image(image, make_clean(48, 64, 0))
        show = [str(ROOT / "config" / "show.py"), "-i", str(image), "-m", str(path), "--show_dir", settings.show_dir]
        runs = {
            "import torch alone": lambda: run_command(["-c", "import torch"]),
            "show.py, sdsen_s2, one 64x48 image": lambda: run_command([*show, "--device", str(job.device)]),
        }
        for run in runs.values():
            run()
        seconds = alternate(runs, job.device, job.repeats or LEAST, 0)
    numbers = {name: summary(s) for name, s in seconds.items()}
    rows = [[name, f"{n['median']:.2f}", f"{n['min']:.2f} .. {n['max']:.2f}"] for name, n in numbers.items()]
    return numbers, table("start-up, imports included", ["median, s", "min .. max, s"], rows)


def make_clean(height: int, width: int, seed: int) -> np.ndarray:
    """A picture without rain, (H, W, 3) uint8: smooth colours and some texture."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(20, 200, (8, 12, 3)).astype(np.float32)
    smooth = cv2.resize(colours, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + rng.normal(0, 5, smooth.shape), 0, 255).astype(np.uint8)


def data(job: Job) -> tuple[Numbers, str]:
    """What the crops of a training step cost."""
    step = job.make("training", "this code")
    step()
    numbers = measure_data(job, step, job.repeats or (20 if job.device.type == "cuda" else LEAST))
    rows = []
    for name, n in numbers.items():
        cells = (f"{1000 * n[part]['median']:.2f} ({n[f'{part}_share']:.2%})" for part in ("making", "waiting"))
        rows.append([name, *cells])
    return numbers, table(f"{job.crops()}, ms (share of a step)", ["making them", "waiting for them"], rows)


def measure_data(job: Job, step: Callable, repeats: int, images: int = 8) -> Numbers:
    """Seconds of making a batch with nothing beside it, and seconds that `step()` waits for one.

    The batches come as in training, made during the step before; shares are of the whole step.
    """
    numbers = {}
    with tempfile.TemporaryDirectory() as folder:
        pairs, clean = Path(folder, "pairs"), Path(folder, "clean")
        for index in range(images):
            B = make_clean(*job.sizes.image, index)
            O = add_rain(B, STYLES["rain100h"], np.random.default_rng(index))
            write_image(pairs / f"{index}.png", np.hstack([B, O]))
            write_image(clean / f"{index}.png", B)
        sources = {"stored pairs": {}, "synthetic rain": {"rain": "rain100h", "clean_dir": str(clean)}}
        for name, overrides in sources.items():
            batches = training_batches(CropDataset(pairs, override(job.settings(), overrides)), 0, job.device)

            def fetch(batches=batches):
                return [x.to(job.device, non_blocking=True).float() / 255 for x in next(batches)]

            fetch()
            making = summary(alternate({"making": fetch}, job.device, 4 * repeats, 0)["making"])
            in_turn = alternate({"waiting": fetch, "step": step}, job.device, repeats + 1, 0)
            waiting, steps = (summary(in_turn[part][1:]) for part in ("waiting", "step"))  # no step beside the first
            whole = waiting["median"] + steps["median"]
            shares = {"making_share": making["median"] / whole, "waiting_share": waiting["median"] / whole}
            numbers[name] = {"making": making, "waiting": waiting, "step": steps, **shares}
    return numbers


def convolution_rates(job: Job) -> tuple[list[Numbers], str]:
    """Rates of single convolutions, as they are and padded."""
    uses = convolutions.uses(job.sizes.batch, job.sizes.patch, job.sizes.image)
    numbers = convolutions.measure(job.device, uses, job.repeats)
    title = f"5x5 convolutions, {job.crops()}: ms, TFLOP/s (times faster)"
    return numbers, table(title, list(uses), convolutions.table_rows(numbers, uses))


SECTIONS: dict[str, Callable[[Job], tuple[Any, str]]] = {
    **{kind: partial(compare, kind) for kind in KINDS},
    "startup": startup,
    "data": data,
    "steps": steps,
    "convolutions": convolution_rates,
    "variants": variants,
}

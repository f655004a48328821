"""Times the product against the plain published forward (reference.py), in one process, alternately.

    python bench/bench.py                        # the CPU's sections, some minutes
    python bench/bench.py --only inference
    python bench/bench.py --only variants        # bf16, torch.compile, parts, checkpointing, one beside the other
    python bench/bench.py --device cuda --only steps convolutions --json numbers.json

The product computes in its device's default precision: float32 on the CPU, 16 bits on a CUDA GPU. The reference
computes in float32, on a GPU without TF32.

FLOPs are nominal: those of the plain algorithm, two for each of `Network.macs_per_pixel`, and a training step counts as
three forwards. The product does fewer multiplications, so its share of the limit may exceed 100 %. The limits are
measured in the same run: the best rates of a large float32 matrix product and of a large copy. Peak memory is what a
first call adds; on a CPU each is measured in a fresh process.

A section that fails does not stop the others; the exit status is 1 then.
"""

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "config"))

import cv2
import numpy as np
import torch

import convolutions
import losses
import model
import reference
import report
from base.console import Parser, run_script
from base.devices import autocast, pick_device
from base.errors import UserError
from base.files import ROOT
from base.images import write_image
from dataset import CropDataset, training_batches
from fast import graphs, native
from main import record_step, train_step
from rain import STYLES, add_rain
from runs import checkpoints
from runs.checkpoints import Checkpoint
from runs.optimization import can_record, make_optimizer
from runs.restore import Restoring, restore
from settings import Settings, override, resolve
from timing import LEAST, Numbers, alternate, first_call, summary

SIDES = ("reference", "product")
KINDS = ("inference", "images", "training")
PRESET = "sdsen"
_KEPT = ExitStack()  # contexts that last as long as the program
STEP_PRESETS = ("sdsen", "sdsen_s2", "dsen", "cnn")


@dataclass(frozen=True)
class Sizes:
    """What is measured, and for how long; the defaults are the paper's crops and a BSD photograph."""

    image: tuple[int, int] = (321, 481)  # height, width
    images: int = 16  # at once
    batch: int = 64
    patch: int = 64
    matrix: int = 8192  # side of the limits' matrices
    megabytes: int = 1024  # of the limits' copy
    budget: float = 4.0  # seconds for the repeats of a kind, beside the warm-up

    def of(self, kind: str) -> tuple[int, ...]:
        """What a kind is measured on: (H, W), (N, H, W), or crops (N, patch)."""
        crops = (self.batch, self.patch)
        return {"inference": self.image, "images": (self.images, *self.image), "training": crops}[kind]


SIZES = {
    "cuda": Sizes(),
    "cpu": Sizes(batch=8, matrix=2048, megabytes=256, budget=35.0),
    "rehearsal": Sizes((24, 36), 2, 2, 16, 256, 16, 0.0),
}


@dataclass
class Job:
    """A call of the bench; `failed` names what did not work."""

    device: torch.device
    sizes: Sizes
    repeats: int | None = None
    limits: Numbers = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def settings(self, preset: str = PRESET) -> Settings:
        return resolve(preset, {"batch_size": self.sizes.batch, "patch_size": self.sizes.patch})

    def crops(self) -> str:
        return f"{self.sizes.batch} crops of {self.sizes.patch}x{self.sizes.patch}"

    def attempt(self, what: str, measure: Callable) -> Any:
        """What `measure()` returns; None where it fails, which is printed and noted, so that the rest goes on."""
        try:
            return measure()
        except Exception as error:
            print(f"{what}: {error}" if isinstance(error, UserError) else f"{what}:\n{traceback.format_exc()}")
            self.failed.append(what)


# ---------------------------------------------------------------- what is run


def make_inference(side: str, settings: Settings, device: torch.device, height: int, width: int) -> Callable:
    """A function that restores one image and returns the backgrounds [B_1, ..., B_T], each (3, H, W)."""
    network, rng = _network_and_generator(settings)
    O = torch.rand(3, height, width, generator=rng).to(device)
    if side == "product":
        network = _replayed(network.to(device).eval(), device)
        return lambda: list(restore(network, O, Restoring(precision=settings.precision)))
    plain = reference.build(settings, network.state_dict()).to(device).eval()
    return lambda: reference.restore(plain, O)


def make_images(side: str, settings: Settings, device: torch.device, number: int, height: int, width: int) -> Callable:
    """A function that returns the rain layers [R_1, ..., R_T] of several images at once, each (N, 3, H, W)."""
    network, rng = _network_and_generator(settings)
    O = torch.rand(number, 3, height, width, generator=rng).to(device)
    if side == "reference":
        plain = reference.build(settings, network.state_dict()).to(device).eval()
        return lambda: _without_gradients(plain, O)
    network = _replayed(network.to(device).eval(), device)

    def run() -> list[torch.Tensor]:
        with autocast(settings.precision, device):
            return _without_gradients(network.at_once, O, network.output_num)

    return run


def _replayed(network: model.DSEN, device: torch.device) -> model.DSEN:
    """The network as commands use it, which replay images of one size (graphs.py), for the rest of the program."""
    _KEPT.enter_context(graphs.replaying(network, device))
    return network


@torch.no_grad()
def _without_gradients(network: Callable, *inputs: Any) -> list[torch.Tensor]:
    return network(*inputs)


def make_training(
    side: str, settings: Settings, device: torch.device, batch: int, patch: int, fused: bool | None = None
) -> Callable:
    """A function that does one step of Adam, always on the same crops, and returns the loss.

    This is where every way to do a step is put together, from the settings; `fused` makes the product's Adam one kernel
    or not, None: as the product does it.
    """
    network, rng = _network_and_generator(settings)
    B = torch.rand(batch, 3, patch, patch, generator=rng)
    O = (B + 0.2 * torch.rand(B.shape, generator=rng)).clamp(0, 1).to(device)
    B = B.to(device)
    if side == "product":
        network = network.to(device).train()
        network.checkpoint_activations = settings.checkpoint_activations
        if settings.compile == "on":
            network.compile()
        optimizer = make_optimizer(network, settings.lr)
        if fused is not None:
            optimizer = torch.optim.Adam(network.parameters(), lr=settings.lr, fused=fused)
        records = can_record(settings, device)
        # In the first step, as in a training.
        recorded = cache(lambda: record_step(network, losses.build(settings), settings, O, B) if records else None)
        return lambda: train_step(network, optimizer, O, B, settings, scored=False, recorded=recorded())["loss"]
    plain = reference.build(settings, network.state_dict()).to(device).train()
    optimizer = torch.optim.Adam(plain.parameters(), lr=settings.lr)
    return lambda: reference.train_step(plain, optimizer, O, B)


def _network_and_generator(settings: Settings) -> tuple[model.DSEN, torch.Generator]:
    """The product's network, with the same weights at each call, and a generator for its inputs."""
    torch.manual_seed(0)
    return model.build(settings), torch.Generator().manual_seed(0)


MAKERS = {"inference": make_inference, "images": make_images, "training": make_training}


# ---------------------------------------------------------------- measuring


def traffic_per_pixel(network: model.DSEN) -> int:
    """Bytes for each pixel of the input, all stages, if a convolution reads its inputs and writes its outputs once."""
    planes = 0
    for module in network.modules():
        if hasattr(module, "in_channels"):
            planes += module.in_channels * getattr(module, "in_orientations", 1)
            planes += module.out_channels * getattr(module, "out_orientations", 1)
    return 4 * planes * network.stage_num


def nominal_gflop(network: model.DSEN, pixels: int) -> float:
    return 2e-9 * pixels * network.macs_per_pixel()


def measure(
    kind: str, settings: Settings, device: torch.device, size: tuple[int, ...], repeats: int | None, budget: float
) -> Numbers:
    """Both sides' times of a kind at a size (see `Sizes.of`), their memory, and how far they agree."""
    runs = {side: MAKERS[kind](side, settings, device, *size) for side in SIDES}
    first = {side: first_call(run, device) for side, run in runs.items()}
    numbers: Numbers = {side: summary(s) for side, s in alternate(runs, device, repeats, budget, settle=True).items()}
    numbers["peaks"] = {side: peak for side, (_, peak) in first.items()}
    network = model.build(settings)
    pixels = size[0] * size[1] ** 2 if kind == "training" else math.prod(size)
    forwards = 3 if kind == "training" else 1
    numbers["nominal_gflop"] = nominal_gflop(network, forwards * pixels)
    numbers["nominal_gb"] = 1e-9 * forwards * pixels * traffic_per_pixel(network)
    numbers["speedup"] = numbers["reference"]["median"] / numbers["product"]["median"]
    plain, product = (result for result, _ in first.values())
    if kind == "training":
        numbers["difference"] = abs(plain - product) / abs(plain)
    else:
        pairs = zip(plain, product, strict=True)
        numbers["difference"] = max((a - b).abs().max().item() for a, b in pairs)
    return numbers


# What a training step could be made of: settings, and what is no setting. `fused`: Adam in one kernel;
# `compiled`: Winograd's way by winograd.cpp.
VARIANTS: dict[str, Numbers] = {
    "default": {},
    "float32": {"precision": "float32"},
    "float32, without winograd.cpp": {"precision": "float32", "compiled": False},
    "bf16": {"precision": "bf16"},
    "bf16, torch.compile": {"precision": "bf16", "compile": "on"},
    "bf16, cudnn.benchmark": {"precision": "bf16", "benchmark": True},
    "bf16, Adam not fused": {"precision": "bf16", "fused": False},
    "bf16, --cuda_graphs off": {"precision": "bf16", "cuda_graphs": "off"},
    "bf16, --accumulate 4": {"precision": "bf16", "accumulate": 4},
    "bf16, --checkpoint_activations true": {"precision": "bf16", "checkpoint_activations": True},
    "reference, float32": {"side": "reference"},
    "reference, TF32": {"side": "reference", "tf32": True},
    "reference, bf16": {"side": "reference", "precision": "bf16"},
}
ONLY_ON = {  # the device that a variant is for, where it is not for both
    "float32, without winograd.cpp": "cpu",
    "bf16, cudnn.benchmark": "cuda",
    "bf16, Adam not fused": "cuda",
    "bf16, --cuda_graphs off": "cuda",
    "reference, TF32": "cuda",
}


def variants_for(device: torch.device) -> list[str]:
    """The names of the variants that mean something on a device."""
    return [name for name in VARIANTS if ONLY_ON.get(name, device.type) == device.type]


def make_variant(name: str, settings: Settings, device: torch.device, size: tuple[int, int]) -> Callable:
    """A function that does one training step the variant's way."""
    variant = dict(VARIANTS[name])
    side, fused = variant.pop("side", "product"), variant.pop("fused", None)
    library = native.library if variant.pop("compiled", True) else lambda: None
    flags = {"benchmark": variant.pop("benchmark", False), "allow_tf32": variant.pop("tf32", False)}
    settings = override(settings, variant)
    step = make_training(side, settings, device, *size, fused=fused)

    def run() -> float:
        with torch.backends.cudnn.flags(enabled=True, **flags), mock.patch.object(native, "library", library):
            if side == "product":
                return step()
            with autocast(settings.precision if "precision" in variant else "float32", device):
                return step()

    return run


def measure_variants(job: Job) -> Numbers:
    """Of each variant seconds of a step, of the first step beyond that, and bytes that a step adds at its peak.

    The variants are timed in turn, each once untimed before.
    """
    names, size = variants_for(job.device), job.sizes.of("training")
    runs = {name: make_variant(name, job.settings(), job.device, size) for name in names}
    first = {name: first_call(run, job.device)[1] for name, run in runs.items()}
    seconds = alternate(runs, job.device, job.repeats, job.sizes.budget, settle=True)
    numbers = {name: summary(s) for name, s in seconds.items()}
    for name, row in numbers.items():
        row["preparation"] = first[name]["seconds"] - row["median"]
        row["ratio"] = numbers[names[0]]["median"] / row["median"]
    for name, peak in peaks(first, "training", job).items():
        numbers[name]["peak"] = peak
    return numbers


# Ways to do the same training step, as settings.
WAYS = {
    "eager": {"cuda_graphs": "off"},
    "as a CUDA graph": {"cuda_graphs": "on"},
    "compiled, as a CUDA graph": {"compile": "on", "cuda_graphs": "on"},
}


def ways_for(device: torch.device) -> list[str]:
    """The names of the ways that may pay on a device."""
    return list(WAYS) if device.type == "cuda" else ["eager"]


def measure_steps(job: Job) -> Numbers:
    """{preset: {way: seconds of a step, nominal TFLOP/s, and seconds and memory of the first}}.

    The ways of a preset are timed in turn, each once untimed before. A way that fails is left out.
    """
    numbers: Numbers = {}
    for preset in STEP_PRESETS:
        steps, first, settings = {}, {}, job.settings(preset)
        for way in ways_for(job.device):
            if started := job.attempt(f"{preset}, {way}", partial(_start_steps, settings, way, job)):
                steps[way], first[way] = started
        seconds = alternate(steps, job.device, job.repeats, job.sizes.budget, settle=True)
        gflop = nominal_gflop(model.build(settings), 3 * job.sizes.batch * job.sizes.patch**2)
        numbers[preset] = {
            way: {**summary(s), "tflops": 1e-3 * gflop / summary(s)["median"], "first": first[way]}
            for way, s in seconds.items()
        }
    return numbers


def _start_steps(settings: Settings, way: str, job: Job) -> tuple[Callable, Numbers]:
    """A function that does a training step a way, and the `first_call` of it."""
    settings = override(settings, WAYS[way])
    if settings.compile == "on":
        torch.compiler.reset()  # else it would stop compiling the same function for one network more
    step = make_training("product", settings, job.device, *job.sizes.of("training"))
    return step, first_call(step, job.device)[1]


def peaks(first: dict[str, Numbers], kind: str, job: Job) -> dict[str, Numbers]:
    """The memory of each name's first call: on a CPU measured anew, each in a fresh process."""
    if job.device.type == "cuda":
        return first
    return {name: _run_peak(name, kind, job) for name in first}


def peak_memory(name: str, kind: str, settings: Settings, device: torch.device, size: tuple[int, ...]) -> Numbers:
    """`first_call` of a side or a variant, in this process, which on a CPU must be a fresh one."""
    if name in SIDES:
        run = MAKERS[kind](name, settings, device, *size)
    else:
        run = make_variant(name, settings, device, size)
    return first_call(run, device)[1]


def _run_peak(name: str, kind: str, job: Job) -> Numbers:
    """`peak_memory` in a fresh process."""
    rehearse = ["--rehearse"] if job.sizes is SIZES["rehearsal"] else []
    return json.loads(_run([sys.executable, __file__, "--peak", name, kind, "--device", str(job.device), *rehearse]))


def _run(command: list[str]) -> str:
    """The standard output of a command. Raises UserError with its last line where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "without a word").splitlines()[-1]
        raise UserError(f"{' '.join(command)} failed: {last}")
    return done.stdout


def measure_startup(device: torch.device, repeats: int | None) -> Numbers:
    """Seconds of `show.py` on one small image, and of importing torch alone, which is most of it."""
    with tempfile.TemporaryDirectory() as folder:
        settings = resolve("sdsen_s2", {"model_dir": folder, "show_dir": str(Path(folder, "show"))})
        path = Path(folder, "random", "latest.pth")
        network, _ = _network_and_generator(settings)
        checkpoints.save(path, Checkpoint(network.state_dict(), 0, settings))
        image = Path(folder, "small.png")
        write_image(image, make_clean(48, 64, 0))
        show = [sys.executable, str(ROOT / "config" / "show.py"), "-i", str(image), "-m", str(path)]
        show += ["--show_dir", settings.show_dir, "--device", str(device)]
        runs = {
            "import_torch": lambda: _run([sys.executable, "-c", "import torch"]),
            "show": lambda: _run(show),
        }
        for run in runs.values():
            run()
        return {name: summary(s) for name, s in alternate(runs, device, repeats or LEAST, 0).items()}


def make_clean(height: int, width: int, seed: int) -> np.ndarray:
    """A picture without rain, (H, W, 3) uint8: smooth colours and some texture."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(20, 200, (8, 12, 3)).astype(np.float32)
    smooth = cv2.resize(colours, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + rng.normal(0, 5, smooth.shape), 0, 255).astype(np.uint8)


def measure_data(
    settings: Settings,
    device: torch.device,
    step: Callable,
    size: tuple[int, int],
    images: int = 8,
    repeats: int = LEAST,
) -> Numbers:
    """What the crops cost: seconds of making a batch, with nothing beside it, and seconds that a step waits for one.

    A step is `step()`. The batches come as in training, made beside the step before; shares are of the whole step.
    """
    numbers = {}
    with tempfile.TemporaryDirectory() as folder:
        pairs, clean = Path(folder, "pairs"), Path(folder, "clean")
        for index in range(images):
            B = make_clean(*size, index)
            O = add_rain(B, STYLES["rain100h"], np.random.default_rng(index))
            write_image(pairs / f"{index}.png", np.hstack([B, O]))
            write_image(clean / f"{index}.png", B)
        sources = {"stored pairs": {}, "rain drawn, rain100h": {"rain": "rain100h", "clean_dir": str(clean)}}
        for name, overrides in sources.items():
            source = override(settings, overrides)
            batches = training_batches(CropDataset(pairs, source), 0, device)

            def fetch(batches=batches):
                return [x.to(device, non_blocking=True).float() / 255 for x in next(batches)]

            fetch()
            making = summary(alternate({"making": fetch}, device, 4 * repeats, 0)["making"])
            in_turn = alternate({"waiting": fetch, "step": step}, device, repeats + 1, 0)
            waiting, steps = (summary(in_turn[part][1:]) for part in ("waiting", "step"))  # no step beside the first
            whole = waiting["median"] + steps["median"]
            numbers[name] = {
                "making": making,
                "waiting": waiting,
                "step": steps,
                "making_share": making["median"] / whole,
                "waiting_share": waiting["median"] / whole,
            }
    return numbers


# ---------------------------------------------------------------- the machine


def describe_machine(device: torch.device) -> Numbers:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    numbers = {
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "device": str(device),
    }
    if device.type == "cuda":
        numbers["gpu"] = torch.cuda.get_device_name(device)
    return numbers


def _cpu_model() -> str:
    try:
        return re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1].strip()
    except (OSError, TypeError):  # no such file, or no such line on some processors
        return platform.processor() or platform.machine()


def measure_limits(device: torch.device, side: int, megabytes: int) -> Numbers:
    """The best GFLOP/s of matrix products of `side` cubed, and the best GB/s, read and written, of a copy."""
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    a_bf16, b_bf16 = a.bfloat16(), b.bfloat16()
    x = torch.rand(megabytes * 2**18, device=device)
    y = torch.empty_like(x)
    runs = {
        "float32": lambda: torch.mm(a, b),
        "bf16": lambda: torch.mm(a_bf16, b_bf16),
        "copy": lambda: y.copy_(x),
    }
    alternate(runs, device, 1, 0)
    seconds = {name: min(s) for name, s in alternate(runs, device, 10, 0).items()}
    return {
        "gflops": 2e-9 * side**3 / seconds["float32"],
        "gflops_bf16": 2e-9 * side**3 / seconds["bf16"],
        "side": side,
        "gb_per_second": 2e-9 * x.nbytes / seconds["copy"],
        "megabytes": megabytes,
    }


# ---------------------------------------------------------------- the table


def table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    """A title with the heads of the columns, and lines of a label and right-aligned cells."""
    lines = [[title, *columns], *([f"  {label}", *cells] for label, *cells in rows)]
    width = max(46, len(title))
    return "\n".join(f"{label:{width}}" + "".join(f"{cell:>24}" for cell in cells) for label, *cells in lines)


def kind_rows(numbers: Numbers, limits: Numbers) -> list[list[str]]:
    """The rows of `measure`, for `table`."""

    def both(label: str, text: Callable[[Numbers], str]) -> list[str]:
        return [label, *(text(numbers[side]) for side in SIDES)]

    gflop, gb = numbers["nominal_gflop"], numbers["nominal_gb"]
    rows = [
        [*both("median, s", lambda n: f"{n['median']:.3f}"), f"{numbers['speedup']:.2f} times faster"],
        both("min .. max, s (repeats)", lambda n: f"{n['min']:.3f} .. {n['max']:.3f} ({len(n['seconds'])})"),
        both("nominal GFLOP/s", lambda n: f"{gflop / n['median']:.1f}"),
        both("  share of float32's matrix product", lambda n: f"{gflop / n['median'] / limits['gflops']:.1%}"),
        both("  share of bf16's matrix product", lambda n: f"{gflop / n['median'] / limits['gflops_bf16']:.1%}"),
        both("  share of the copy's GB/s, nominal", lambda n: f"{gb / n['median'] / limits['gb_per_second']:.1%}"),
    ]
    if "peaks" in numbers:
        peaks = numbers["peaks"]
        ratio = peaks["reference"]["added"] / max(1, peaks["product"]["added"])
        added = [f"{peaks[side]['added'] / 2**20:.0f}" for side in SIDES]
        rows.append(["peak memory added by one run, MiB", *added, f"{ratio:.2f} times less"])
        rows.append(["  to that of imports and network, MiB", *(f"{peaks[s]['before'] / 2**20:.0f}" for s in SIDES)])
    return rows


def startup_rows(numbers: Numbers) -> list[list[str]]:
    """The rows of `measure_startup`, for `table`."""
    labels = {"import_torch": "import torch alone", "show": "show.py, sdsen_s2, one 64x48 image"}
    return [[labels[name], f"{n['median']:.2f}", f"{n['min']:.2f} .. {n['max']:.2f}"] for name, n in numbers.items()]


def variant_rows(numbers: Numbers) -> list[list[str]]:
    """The rows of `measure_variants`, for `table`: after how many steps a preparation has paid is against the first."""
    first = next(iter(numbers.values()))
    rows = []
    for name, n in numbers.items():
        gain = first["median"] - n["median"]
        more = n["preparation"] - first["preparation"]
        pays = f" (after {more / gain:.0f} steps)" if gain > 0 and more > 5 * n["median"] else ""
        peak = f"{n['peak']['added'] / 2**20:.0f}"
        rows.append([name, f"{n['median']:.4f}", f"{n['ratio']:.2f}", f"{n['preparation']:.1f}{pays}", peak])
    return rows


def step_rows(numbers: Numbers, device: torch.device) -> list[list[str]]:
    """The rows of `measure_steps`, for `table`; on a CPU, where it needs a fresh process, without the memory."""
    rows = []
    for preset, ways in numbers.items():
        for way, n in ways.items():
            added = f"{n['first']['added'] / 2**20:.0f}" if device.type == "cuda" else "-"
            first = f"{n['first']['seconds']:.1f}"
            rows.append([f"{preset}, {way}", f"{1000 * n['median']:.2f}", f"{n['tflops']:.2f}", first, added])
    return rows


def data_rows(numbers: Numbers) -> list[list[str]]:
    """The rows of `measure_data`, for `table`."""
    rows = []
    for name, n in numbers.items():
        making, waiting = (1000 * n[part]["median"] for part in ("making", "waiting"))
        shares = f"{n['making_share']:.2%}", f"{n['waiting_share']:.2%}"
        rows.append([name, f"{making:.2f} ({shares[0]})", f"{waiting:.2f} ({shares[1]})"])
    return rows


# ---------------------------------------------------------------- the command


def kind_section(kind: str, job: Job) -> tuple[Numbers, str]:
    size = job.sizes.of(kind)
    numbers = measure(kind, job.settings(), job.device, size, job.repeats, job.sizes.budget)
    numbers["peaks"] = peaks(numbers["peaks"], kind, job)
    height, width = job.sizes.image
    title = {
        "inference": f"inference: {PRESET}, one {width}x{height} image",
        "images": f"inference: {PRESET}, {job.sizes.images} images of {width}x{height} at once",
        "training": f"training step: {PRESET}, {job.crops()}",
    }[kind]
    of = "rel. difference of the loss" if kind == "training" else "max abs difference of the stages' outputs"
    rows = [*kind_rows(numbers, job.limits), [of, "", f"{numbers['difference']:.1e}"]]
    return numbers, table(title, [*SIDES, "ratio"], rows)


def startup_section(job: Job) -> tuple[Numbers, str]:
    numbers = measure_startup(job.device, job.repeats)
    return numbers, table("start-up, imports included", ["median, s", "min .. max, s"], startup_rows(numbers))


def data_section(job: Job) -> tuple[Numbers, str]:
    settings = job.settings()
    step = make_training("product", settings, job.device, *job.sizes.of("training"))
    step()
    repeats = job.repeats or (20 if job.device.type == "cuda" else LEAST)
    numbers = measure_data(settings, job.device, step, job.sizes.image, repeats=repeats)
    title = f"{job.crops()}, ms (share of a step)"
    return numbers, table(title, ["making them", "waiting for them"], data_rows(numbers))


def steps_section(job: Job) -> tuple[Numbers, str]:
    numbers = measure_steps(job)
    columns = ["ms a step", "nominal TFLOP/s", "first step, s", "memory added, MiB"]
    return numbers, table(f"training step: {job.crops()}", columns, step_rows(numbers, job.device))


def convolutions_section(job: Job) -> tuple[list[Numbers], str]:
    uses = convolutions.uses(job.sizes.batch, job.sizes.patch, job.sizes.image)
    numbers = convolutions.measure(job.device, uses, job.repeats)
    title = f"5x5 convolutions, {job.crops()}: ms, TFLOP/s (times faster)"
    return numbers, table(title, list(uses), convolutions.table_rows(numbers, uses))


def variants_section(job: Job) -> tuple[Numbers, str]:
    numbers = measure_variants(job)
    columns = ["s a step", "times faster", "preparation, s", "memory added, MiB"]
    return numbers, table(f"training step: {job.crops()}", columns, variant_rows(numbers))


# Each measures, and returns its numbers and the text to print.
SECTIONS: dict[str, Callable[[Job], tuple[Any, str]]] = {
    **{kind: partial(kind_section, kind) for kind in KINDS},
    "startup": startup_section,
    "data": data_section,
    "steps": steps_section,
    "convolutions": convolutions_section,
    "variants": variants_section,
}
DEFAULT_SECTIONS = {"cpu": ("inference", "training", "startup", "data"), "cuda": tuple(SECTIONS)}


def sections_for(device: torch.device, named: Sequence[str] | None) -> tuple[str, ...]:
    """The sections to measure: those that are named, or the device's own."""
    return tuple(named or DEFAULT_SECTIONS[device.type])


def bench(job: Job, sections: Sequence[str], path: Path | None) -> None:
    """Measure and print the sections in turn; their numbers go to the file at `path` as soon as they are there."""
    machine = describe_machine(job.device)
    limits = job.limits = measure_limits(job.device, job.sizes.matrix, job.sizes.megabytes)
    print("machine:", ", ".join(f"{name} {value}" for name, value in machine.items()))
    print(
        f"limits:  matrix product of {limits['side']} cubed: {limits['gflops']:.1f} GFLOP/s in float32, "
        f"{limits['gflops_bf16']:.1f} in bf16; copy of {limits['megabytes']} MiB: {limits['gb_per_second']:.1f} GB/s",
        flush=True,
    )
    report.add(path, {"machine": machine, "limits": limits, "sizes": asdict(job.sizes)})
    for name in sections:
        if found := job.attempt(name, partial(SECTIONS[name], job)):
            numbers, text = found
            print(f"\n{text}", flush=True)
            report.add(path, {name: numbers})
    if job.failed:
        print(f"\nfailed: {'; '.join(job.failed)}")


def main(arguments: list[str]) -> int:
    parser = Parser(description="Time the product against the plain published forward, and print a table.")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="measure these alone, in this order")
    parser.add_argument("--repeats", type=int, help="timings of each; default: as many as some time allows")
    parser.add_argument("--rehearse", action="store_true", help="tiny images and crops: see that everything runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add all numbers to this file")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # for `peaks`: a side or variant, and a kind
    known = parser.parse_args(arguments)
    device = pick_device(known.device)
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {known.device!r}: the bench knows cpu and cuda")
    if known.repeats is not None and known.repeats < 1:
        raise UserError(f"--repeats must be at least 1, got {known.repeats}")
    job = Job(device, SIZES["rehearsal" if known.rehearse else device.type], known.repeats)
    if known.peak:
        name, kind = known.peak
        print(json.dumps(peak_memory(name, kind, job.settings(), device, job.sizes.of(kind))))
        return 0
    bench(job, sections_for(device, known.only), known.json)
    return 1 if job.failed else 0


if __name__ == "__main__":
    run_script(main)

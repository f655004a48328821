"""The paper's claims, measured: PSNR by the angle of the rain, and scores and time by the number of stages.

    python main.py -a tilt -m cnn_rain800_short cnn_c4da_rain800_short dsen_rain800_short --rain rain800
    python main.py -a stages -m sdsen_rain800/latest

A run's name alone is its best checkpoint by validation; the rows of the paper's recipe are tested as RUN/latest. Both
write to results/; `main.py -a tables --write` puts what lies there into README.md and results/README.md.
"""

import json
import statistics
import time
from collections.abc import Sequence
from math import ceil, hypot
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from base import ranks
from base.console import log
from base.devices import describe, pick_device
from base.errors import UserError
from base.files import ROOT, write_bytes
from base.images import read_pair
from cal_ssim import METRICS, scores
from dataset import data_path, list_pairs, to_tensor
from fast.graphs import replaying
from rain import STYLES, RainStyle, render
from runs.restore import Restoring, open_network, restore, restore_8bit, score_pairs
from settings import Settings

RESULTS = ROOT / "results"
PLOT = ROOT / "pictures" / "tilt.png"
ANGLES = range(-90, 91, 15)  # degrees that the rain is turned by; positive leans as "/"
IMAGES = 24  # backgrounds
SOFTENING = 0.7  # sigma of the blur, pixels
SIDE = 256  # of the square that is cut out of a background, pixels: every angle then sees the same
IMAGE = (3, 321, 481)  # that stages are timed on
REPEATS = 3


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_bytes(path, (json.dumps(values, indent=1) + "\n").encode())


# ---------------------------------------------------------------- tilt


def turned_rain(side: int, style: RainStyle, angle: float, rng: np.random.Generator) -> np.ndarray:
    """A rain layer (side, side) uint8, turned by `angle` degrees; the same generator state gives the same rain.

    It is drawn on a square that holds it at every angle, and softened before it is turned, so that interpolating leaves
    it as sharp at every angle.
    """
    canvas = ceil(hypot(side, side)) + 4
    canvas += (canvas - side) % 2  # both squares then have the same middle
    rain = cv2.GaussianBlur(render(canvas, canvas, style, rng), (0, 0), SOFTENING)
    matrix = cv2.getRotationMatrix2D(((canvas - 1) / 2, (canvas - 1) / 2), -angle, 1)
    matrix[:, 2] -= (canvas - side) // 2
    return cv2.warpAffine(rain, matrix, (side, side), flags=cv2.INTER_LANCZOS4)


def tilted_pairs(
    paths: Sequence[tuple[int, Path]], style: RainStyle, angle: float, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """(O, B), each (3, SIDE, SIDE) uint8: the middle of each numbered pair's background, under rain turned by `angle`.

    A number's rain is the same at every angle.
    """
    pairs = []
    for number, path in paths:
        clean, _ = read_pair(path)
        top, left = ((length - SIDE) // 2 for length in clean.shape[:2])
        B = np.ascontiguousarray(clean[top : top + SIDE, left : left + SIDE])
        rain = turned_rain(SIDE, style, angle, np.random.default_rng((seed, number)))
        pairs.append((to_tensor(cv2.add(B, cv2.merge([rain] * 3))), to_tensor(B)))
    return pairs


def tilt(names: list[str], overrides: dict[str, Any]) -> dict[str, Any]:
    """PSNR by angle of each checkpoint on test backgrounds of the first one's data, into results/tilt.json and a plot.

    The rain is that of `--rain`, else the first run's, else rain800. Several ranks share the backgrounds.
    """
    others = {name: value for name, value in overrides.items() if name != "rain"}
    opened = [(name, *open_network(None, name, others)) for name in names]
    settings = opened[0][2]
    style = overrides.get("rain") or settings.rain or "rain800"
    paths = list_pairs(data_path(settings) / "test")
    paths = [path for path in paths if min(read_pair(path)[0].shape[:2]) >= SIDE][:IMAGES]
    if not paths:
        raise UserError(f"no test image of {settings.data_dir} has {SIDE}x{SIDE} pixels")
    device = pick_device(settings.device)
    curves: dict[str, list[float]] = {"rainy input": [], **{name: [] for name in names}}
    for angle in ANGLES:
        pairs = tilted_pairs(ranks.share(list(enumerate(paths))), STYLES[style], angle, settings.seed)
        curves["rainy input"].append(_mean_psnr([(O, B) for O, B in pairs]))
        for run, network, own, _, _ in opened:
            with replaying(network, device):
                derained = [(restore_8bit(network, O, device, Restoring.of(own))[-1], B) for O, B in pairs]
            curves[run].append(_mean_psnr(derained))
        log.info(f"{angle:+4d} degrees: " + ", ".join(f"{run} {psnr[-1]:.2f} dB" for run, psnr in curves.items()))
    runs = {
        run: {"steps": step, "batch_size": s.batch_size, "data": Path(s.data_dir).name, "rain": s.rain}
        for run, _, s, _, step in opened
    }
    result = {"rain": style, "images": len(paths), "angles": list(ANGLES), "psnr": curves, "runs": runs}
    if ranks.is_first():
        write_json(RESULTS / "tilt.json", result)
        plot_tilt(result, PLOT)
        log.info(f"{RESULTS / 'tilt.json'}, {PLOT}")
    return result


def _mean_psnr(pairs: list[tuple[Tensor, Tensor]]) -> float:
    values = ranks.gather([scores(image, B)["psnr"] for image, B in pairs])
    return round(float(np.mean(values)), 4)


def plot_tilt(result: dict[str, Any], path: Path) -> None:
    """The curves as a picture: on the left PSNR, on the right what each run loses to itself at 0 degrees."""
    import matplotlib  # here, as nothing else needs it, and it takes a second

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    upright = result["angles"].index(0)
    for name, psnr in result["psnr"].items():
        style = {"color": "grey", "linestyle": ":"} if name == "rainy input" else {"marker": "."}
        left.plot(result["angles"], psnr, label=name, **style)
        right.plot(result["angles"], np.array(psnr) - psnr[upright], **style)
    left.set(ylabel="PSNR, dB")
    right.set(ylabel="PSNR less that at 0 degrees, dB")
    for axes in (left, right):
        axes.set(xlabel=f"degrees that {result['rain']} rain is turned by", xticks=range(-90, 91, 30))
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def tilt_markdown(result: dict[str, Any]) -> str:
    """The table of a tilt.json, with what each run loses between 0 and its worst angle."""
    angles, upright = result["angles"], result["angles"].index(0)
    lines = [
        "| PSNR at | " + " | ".join(f"{angle}°" for angle in angles) + " | worst less 0° |",
        "|---" * (len(angles) + 2) + "|",
    ]
    for name, psnr in result["psnr"].items():
        cells = [f"{value:.2f}" for value in psnr]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {min(psnr) - psnr[upright]:+.2f} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- stages


def stages(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Scores after each stage on the test set, and seconds of stopping there, into results/stages_NAME.json."""
    network, settings, path, step = open_network(None, name, overrides)
    device = pick_device(settings.device)
    with replaying(network, device):
        seconds = _seconds_by_stage(network, settings, device)
    paths = list_pairs(data_path(settings) / "test")
    scored = score_pairs(network, paths, device, Restoring.of(settings))
    means = np.nanmean(ranks.gather([pair.scores for pair in scored]), 0)  # (1 + stages, METRICS)
    rows = [
        {"stage": t, "seconds": seconds[t - 1] if t else 0.0, **dict(zip(METRICS, row.round(4).tolist(), strict=True))}
        for t, row in enumerate(means)
    ]
    run = settings.run or path.stem
    result = {
        "run": run,
        "model": f"{run}/{path.stem}" if path.parent.name == run else run,  # what -m takes
        "step": step,
        "data": str(Path(settings.data_dir).name),
        "images": len(paths),
        "device": describe(device),
        "size": f"{IMAGE[2]}x{IMAGE[1]}",
        "stages": rows,
    }
    if ranks.is_first():
        write_json(RESULTS / f"stages_{result['run']}.json", result)
        log.info(stages_markdown(result))
    return result


def _seconds_by_stage(network: nn.Module, settings: Settings, device: torch.device) -> list[float]:
    """Median seconds of an image of IMAGE with --stages 1, 2, ..; all in turn, as the machine's speed drifts."""
    O = torch.rand(IMAGE, generator=torch.Generator().manual_seed(0)).to(device)
    seconds: list[list[float]] = [[] for _ in range(network.output_num)]
    for repeat in range(1 + REPEATS):  # the first is the warm-up
        for stage_num in range(1, network.output_num + 1):
            started = time.perf_counter()
            for B in restore(network, O, Restoring.of(settings), stage_num):
                B.sum().item()  # waits for the device
            if repeat:
                seconds[stage_num - 1].append(time.perf_counter() - started)
    return [round(statistics.median(s), 4) for s in seconds]


def stages_markdown(result: dict[str, Any]) -> str:
    """The table of a stages_NAME.json."""
    lines = [
        f"| `--stages` | PSNR | SSIM | PSNR (Y) | SSIM (Y) | seconds for {result['size']} |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["stages"]:
        label, seconds = (row["stage"], f"{row['seconds']:.2f}") if row["stage"] else ("rainy input", "")
        values = [f"{row['psnr']:.2f}", f"{row['ssim']:.4f}", f"{row['psnr_y']:.2f}", f"{row['ssim_y']:.4f}"]
        lines.append(f"| {label} | " + " | ".join([*values, seconds]) + " |")
    return "\n".join(lines)

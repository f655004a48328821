"""How robust networks are to tilted rain: PSNR by the angle that synthetic rain is turned by.

    python main.py -a tilt -m cnn_rain800_short cnn_c4da_rain800_short dsen_rain800_short --rain rain800

It writes results/tilt.json and docs/pictures/tilt.png. A run's name alone is its best checkpoint by validation; the
rows of the paper's recipe are tested as RUN/latest.
"""

import io
from math import ceil, hypot
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from base import ranks
from base.console import Progress, log
from base.devices import pick_device
from base.errors import MissingFile
from base.files import ROOT, write_bytes
from base.images import read_pair
from cal_ssim import scores
from dataset import data_path, list_pairs, to_tensor
from fast.graphs import replaying
from paper.tables import Result, write_result
from runs.restore import Restoring, open_network, restore_8bit
from synthesis.streaks import render
from synthesis.styles import STYLES, RainStyle

PLOT = ROOT / "docs" / "pictures" / "tilt.png"
ANGLES = range(-90, 91, 15)  # degrees that the rain is turned by; positive leans as "/"
IMAGES = 24  # backgrounds
SOFTENING = 0.7  # sigma of the blur, pixels
SIDE = 256  # of the square that is cut out of a background, pixels: it holds the same scene at every angle
INPUT = "rainy input"
Pair = tuple[Tensor, Tensor]


def turned_rain(side: int, style: RainStyle, angle: float, rng: np.random.Generator) -> np.ndarray:
    """A rain layer (side, side) uint8, turned by `angle` degrees; the same generator state gives the same rain."""
    canvas = ceil(hypot(side, side)) + 4  # holds the result at every angle
    canvas += (canvas - side) % 2  # both squares have the same middle
    # Softened, so that it is equally sharp at every angle in spite of the interpolation.
    rain = cv2.GaussianBlur(render(canvas, canvas, style, rng), (0, 0), SOFTENING)
    matrix = cv2.getRotationMatrix2D(((canvas - 1) / 2, (canvas - 1) / 2), -angle, 1)
    matrix[:, 2] -= (canvas - side) // 2
    return cv2.warpAffine(rain, matrix, (side, side), flags=cv2.INTER_LANCZOS4)


def tilted_pairs(paths: list[tuple[int, Path]], style: RainStyle, angle: float, seed: int) -> list[Pair]:
    """(O, B), each (3, SIDE, SIDE) uint8: the middle of each numbered pair's background, under its rain turned."""
    pairs = []
    for number, path in paths:
        clean, _ = read_pair(path)
        top, left = ((length - SIDE) // 2 for length in clean.shape[:2])
        B = np.ascontiguousarray(clean[top : top + SIDE, left : left + SIDE])
        R = turned_rain(SIDE, style, angle, np.random.default_rng((seed, number)))
        pairs.append((to_tensor(cv2.add(B, cv2.merge([R] * 3))), to_tensor(B)))
    return pairs


def measure(names: list[str], overrides: dict[str, Any]) -> None:
    """PSNR of each checkpoint at each angle, on test backgrounds of the first one's data set.

    The rain is that of `--rain`, else the first run's, else rain800. Raises MissingFile without a background.
    """
    others = {name: value for name, value in overrides.items() if name != "rain"}
    opened = [(name, *open_network(None, name, others)) for name in names]
    settings = opened[0][2]
    style = overrides.get("rain") or settings.rain or "rain800"
    paths = list_pairs(data_path(settings) / "test")
    paths = [path for path in paths if min(read_pair(path)[0].shape[:2]) >= SIDE][:IMAGES]
    if not paths:
        raise MissingFile(f"no test image of {settings.data_dir} has {SIDE}x{SIDE} pixels")
    device = pick_device(settings.device)
    curves: dict[str, list[float]] = {INPUT: [], **{name: [] for name in names}}
    for angle in ANGLES:
        pairs = tilted_pairs(ranks.share(list(enumerate(paths))), STYLES[style], angle, settings.seed)
        curves[INPUT].append(_mean_psnr(pairs))
        for run, network, own, _, _ in opened:
            with replaying(network, device):
                shown = Progress(pairs, f"{run} at {angle} degrees", unit="image")
                restored = [(restore_8bit(network, O, device, Restoring.of(own))[-1], B) for O, B in shown]
            curves[run].append(_mean_psnr(restored))
        log.info(f"{angle:+4d} degrees: " + ", ".join(f"{run} {psnr[-1]:.2f} dB" for run, psnr in curves.items()))
    runs = {
        run: {"steps": step, "batch_size": own.batch_size, "data": Path(own.data_dir).name, "rain": own.rain}
        for run, _, own, _, step in opened
    }
    result = {"rain": style, "images": len(paths), "angles": list(ANGLES), "psnr": curves, "runs": runs}
    if ranks.is_first():
        log.info(f"wrote {write_result('tilt', result)}")
        plot(result, PLOT)
        log.info(f"wrote {PLOT}")


def _mean_psnr(pairs: list[Pair]) -> float:
    values = ranks.gather([scores(image, B)["psnr"] for image, B in pairs])
    return round(float(np.mean(values)), 4)


def plot(result: Result, path: Path) -> None:
    """Two plots over the angle: PSNR, and PSNR less that at 0 degrees."""
    from matplotlib.figure import Figure  # takes a second, and nothing else needs it

    figure = Figure((11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    upright = result["angles"].index(0)
    for name, psnr in result["psnr"].items():
        style = {"color": "grey", "linestyle": ":"} if name == INPUT else {"marker": "."}
        left.plot(result["angles"], psnr, label=name, **style)
        right.plot(result["angles"], np.array(psnr) - psnr[upright], **style)
    for axes, label in ((left, "PSNR, dB"), (right, "PSNR less that at 0 degrees, dB")):
        axes.set(xlabel=f"degrees that {result['rain']} rain is turned by", ylabel=label, xticks=range(-90, 91, 30))
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80, format="png")
    write_bytes(path, buffer.getvalue())

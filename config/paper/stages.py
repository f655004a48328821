"""What each stage adds: scores on the test set after every stage, and the seconds of stopping there.

    python main.py -a stages -m sdsen_rain800/latest

It writes results/stages_RUN.json. A run's name alone is its best checkpoint by validation.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from base import ranks
from base.console import log
from base.devices import describe, pick_device
from cal_ssim import METRICS
from dataset import data_path, list_pairs
from fast.graphs import replaying
from paper.results import Result, write_result
from runs.restore import Restoring, open_network, restore, score_pairs
from settings import Settings

SIZE = (3, 321, 481)  # (C, H, W) of the timed image
REPEATS = 3


def measure(name: str, overrides: dict[str, Any]) -> None:
    """Score and time every stage of a checkpoint. Several ranks share the test images."""
    network, settings, path, step = open_network(None, name, overrides)
    device = pick_device(settings.device)
    with replaying(network, device):
        seconds = seconds_by_stage(network, settings, device)
    paths = list_pairs(data_path(settings) / "test")
    scored = [pair.scores for pair in score_pairs(network, paths, device, Restoring.of(settings))]
    means = np.nanmean(ranks.gather(scored), 0).round(4).tolist()  # (1 + stages, METRICS)
    run = settings.run or path.stem
    result = {
        "run": run,
        "model": f"{run}/{path.stem}" if path.parent.name == run else run,  # what -m takes
        "step": step,
        "data": Path(settings.data_dir).name,
        "images": len(paths),
        "device": describe(device),
        "size": f"{SIZE[2]}x{SIZE[1]}",
        "stages": [
            {"stage": t, "seconds": s, **dict(zip(METRICS, row, strict=True))}
            for t, (s, row) in enumerate(zip([0.0, *seconds], means, strict=True))
        ],
    }
    if ranks.is_first():
        log.info(f"wrote {write_result(f'stages_{run}', result)}")
        for row in result["stages"]:
            log.info("  ".join(f"{name} {value}" for name, value in row.items()))


def seconds_by_stage(network: nn.Module, settings: Settings, device: torch.device) -> list[float]:
    """Median seconds of an image of SIZE with --stages 1, 2, ..., timed in turn because the machine's speed drifts."""
    O = torch.rand(SIZE, generator=torch.Generator().manual_seed(0)).to(device)
    seconds: list[list[float]] = [[] for _ in range(network.output_num)]
    for repeat in range(1 + REPEATS):  # the first is the warm-up
        for stage_num in range(1, network.output_num + 1):
            started = time.perf_counter()
            for restored in restore(network, O, Restoring.of(settings), stage_num):
                restored.sum().item()  # waits for the device
            if repeat:
                seconds[stage_num - 1].append(time.perf_counter() - started)
    return [round(statistics.median(s), 4) for s in seconds]


def columns_and_rows(result: Result) -> tuple[list[str], list[list[str]]]:
    """The table of a result."""
    rows = []
    for row in result["stages"]:
        label, seconds = (row["stage"], f"{row['seconds']:.2f}") if row["stage"] else ("rainy input", "")
        scores = [f"{row['psnr']:.2f}", f"{row['ssim']:.4f}", f"{row['psnr_y']:.2f}", f"{row['ssim_y']:.4f}"]
        rows.append([label, *scores, seconds])
    return ["`--stages`", "PSNR", "SSIM", "PSNR (Y)", "SSIM (Y)", f"seconds for {result['size']}"], rows

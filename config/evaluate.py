"""Whole images through a network: the restored image of every stage, and its scores."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import checkpoint as checkpoints
import model
import settings as knobs
from cal_ssim import METRICS, scores, to_8bit
from common import UserError
from dataset import read_whole
from settings import Settings

NEARLY_INPUT = 0.5  # levels of 255; a result whose mean change is below is hardly derained
BAR = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


def pick_device(name: str) -> torch.device:
    """The device of a settings' `device`; "auto" is the first of cuda, mps and cpu that there is. Raises UserError."""
    there = [kind for kind, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps)) if backend.is_available()]
    there.append("cpu")
    if name == "auto":
        return torch.device(there[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is none of auto, cpu, mps, cuda, cuda:N") from None
    if device.type not in there:
        raise UserError(f"device {name!r}: PyTorch sees no such device here; there is {', '.join(there)}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


def open_network(
    preset: str | None, name: str | None, overrides: dict[str, Any]
) -> tuple[nn.Module, Settings, Path, int]:
    """The network that a command names, in eval mode on its device: (network, settings, file, step).

    `name` is a checkpoint's; without it, the best checkpoint of the run that `overrides` or `preset` (default sdsen)
    names. The network is rebuilt from the settings in the checkpoint; one of the published code has none, and there
    `preset` tells. Raises UserError where there is no such checkpoint or it is another network than `preset`.
    """
    asked = knobs.resolve(preset or "sdsen", overrides)
    path = checkpoints.find(name or asked.run, Path(asked.model_dir))
    checkpoint = checkpoints.load(path)
    places = {place: getattr(asked, place) for place in ("model_dir", "log_dir", "show_dir", "device")}
    settings = asked
    if checkpoint.settings:
        settings = knobs.replace(checkpoint.settings, {**places, **overrides})
        for field in knobs.NETWORK:
            if preset and getattr(settings, field) != getattr(asked, field):
                raise UserError(
                    f"{path} has {field} {getattr(settings, field)}, preset {preset} {getattr(asked, field)}: "
                    "leave -p out, or name another checkpoint with -m"
                )
    network = model.build(settings)
    checkpoints.load_weights(network, checkpoint, path)
    return network.to(pick_device(settings.device)).eval(), settings, path, checkpoint.step


def restore(network: nn.Module, O: Tensor, stage_num: int | None = None, memory_gib: float = 0.0) -> Iterator[Tensor]:
    """The background B_t = O - R_t of every stage, each (3, H, W) in [0, 1], of one rainy image (3, H, W) in [0, 1].

    In a terminal, a bar shows the progress of an image that takes long.
    """
    bar = tqdm(total=1.0, delay=3, leave=False, disable=not sys.stderr.isatty(), bar_format=BAR, dynamic_ncols=True)
    with bar:
        for R in network.each_stage(O, stage_num, memory_gib, bar.update):
            yield torch.sub(O, R, out=R).clamp_(0, 1)


def restore_8bit(network: nn.Module, O: Tensor, device: torch.device, memory_gib: float = 0.0) -> list[Tensor]:
    """The same for an 8-bit image: (3, H, W) uint8 on the CPU to one (3, H, W) uint8 a stage, as it would be saved."""
    return [to_8bit(image).cpu() for image in restore(network, O.to(device).float() / 255, memory_gib=memory_gib)]


def score_pairs(
    network: nn.Module, paths: list[Path], device: torch.device, each=None, memory_gib: float = 0.0
) -> np.ndarray:
    """Scores of whole pairs, (pairs, 1 + stages, METRICS): of the rainy input, then of every stage.

    `each(path, O, restored, B, rows)` is called after each pair. The network is put in eval mode and back.
    """
    was_training = network.training
    network.eval()
    table = []
    for path in paths:
        O, B = read_whole(path)
        restored = restore_8bit(network, O, device, memory_gib)
        rows = [scores(image, B) for image in (O, *restored)]
        table.append([[row[name] for name in METRICS] for row in rows])
        if each:
            each(path, O, restored, B, rows)
    network.train(was_training)
    return np.array(table)

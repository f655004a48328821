"""Whole images through a network: the restored image of every stage, and its scores."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import model
from base import ranks
from base.console import in_terminal, log
from base.devices import autocast, compute_dtype, pick_device
from base.errors import UserError
from cal_ssim import METRICS, scores, to_8bit
from dataset import read_whole
from fast import any_size
from fast.graphs import replaying
from runs import checkpoints
from settings import NETWORK_FIELDS, Settings, override, resolve

OWN = ("model_dir", "log_dir", "show_dir", "device", "precision", "cuda_graphs", "mirror")  # not the training's
NEARLY_INPUT = 0.5  # levels of 255; a result whose mean change is below is hardly derained
BAR = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


def open_network(
    preset: str | None, name: str | None, overrides: dict[str, Any]
) -> tuple[nn.Module, Settings, Path, int]:
    """The network that a command names, in eval mode on its device: (network, settings, file, step).

    `name` is a checkpoint's; without it, the best checkpoint of the run that `overrides` or `preset` (default sdsen)
    names. The network is rebuilt from the settings in the checkpoint, with as many stages as were trained, and has the
    averaged weights if there are any; one of the published code has none, and there
    `preset` tells. Raises UserError where there is no such checkpoint or it is another network than `preset`.
    """
    asked = resolve(preset or "sdsen", overrides)
    path, checkpoint = ranks.from_first(lambda: _find_and_load(name or asked.run, Path(asked.model_dir)))
    places = {name: getattr(asked, name) for name in OWN}
    settings = asked
    if checkpoint.settings:
        settings = override(checkpoint.settings, {**places, **overrides})
        for field in NETWORK_FIELDS:
            if preset and getattr(settings, field) != getattr(asked, field):
                raise UserError(
                    f"{path} has {field} {getattr(settings, field)}, preset {preset} {getattr(asked, field)}: "
                    "leave -p out, or name another checkpoint with -m"
                )
    network = model.build(settings)
    network.cuda_graphs = settings.cuda_graphs != "off"
    checkpoints.load_weights(network, checkpoint, path, average=True)
    return network.to(pick_device(settings.device)).eval(), settings, path, checkpoint.step


def _find_and_load(name: str, model_dir: Path) -> tuple[Path, checkpoints.Checkpoint]:
    path = checkpoints.find(name, model_dir)
    return path, checkpoints.load(path)


def how_to_restore(settings: Settings) -> tuple[float, str, bool]:
    """What `restore` takes of the settings."""
    return settings.memory_gib, settings.precision, settings.mirror


def restore(
    network: nn.Module,
    O: Tensor,
    stage_num: int | None = None,
    memory_gib: float = 0.0,
    precision: str = "auto",
    mirror: bool = False,
) -> Iterator[Tensor]:
    """The background B_t = O - R_t of every stage, each (3, H, W) in [0, 1], of one rainy image (3, H, W) in [0, 1].

    `memory_gib`, `precision` and `mirror` are the settings'. What float16 can't hold is computed in float32. In a
    terminal, a bar shows the progress of an image that takes long.
    """
    bar = tqdm(total=1.0, delay=3, leave=False, disable=not in_terminal(), bar_format=BAR, dynamic_ncols=True)
    restoring = _mirrored_too if mirror else any_size.rain_layers
    rain_layers = restoring(network, O, stage_num, memory_gib, bar.update)
    half = compute_dtype(precision, O.device) == torch.float16
    with bar:
        for done in itertools.count():
            with autocast(precision, O.device):  # around the network alone, not around the caller's work
                R = next(rain_layers, None)
            if R is None:
                return
            if half and not R.isfinite().all():
                log.warning("the activations leave float16's range, so this image is computed in float32")
                bar.reset()
                rain_layers = itertools.islice(restoring(network, O, stage_num, memory_gib, bar.update), done, None)
                half, precision = False, "float32"
                R = next(rain_layers)
            R = R.to(O.dtype)  # autocast may have made it 16 bits, on MPS
            yield torch.sub(O, R, out=R).clamp_(0, 1)


def _mirrored_too(
    network: nn.Module, O: Tensor, stage_num: int | None, memory_gib: float, tick: Callable[[float], object]
) -> Iterator[Tensor]:
    """As `any_size.rain_layers`: the means of the rain layers of `O` and, turned back, of its mirror image.

    The mirror image goes first, as a whole, and its rain layers are kept: 12 bytes a pixel and stage.
    """

    def half_way(share: float) -> None:
        tick(share / 2)

    mirrored = list(any_size.rain_layers(network, O.flip(-1), stage_num, memory_gib, half_way))
    for R, other in zip(any_size.rain_layers(network, O, stage_num, memory_gib, half_way), mirrored, strict=True):
        yield R.add_(other.flip(-1)).div_(2)


def restore_8bit(network: nn.Module, O: Tensor, device: torch.device, *how) -> list[Tensor]:
    """The same for an 8-bit image: (3, H, W) uint8 to one (3, H, W) uint8 a stage, as it would be saved, on `device`.

    `how` are `memory_gib`, `precision` and `mirror`, as `restore` takes them.
    """
    return [to_8bit(image) for image in restore(network, O.to(device).float() / 255, None, *how)]


def score_pairs(
    network: nn.Module, paths: list[Path], device: torch.device, each: Callable = lambda *_: None, *how
) -> tuple[np.ndarray, list]:
    """Scores of whole pairs, (pairs, 1 + stages, METRICS): of the rainy input, then of every stage.

    `each(path, O, restored, B, rows)` is called after each pair, whose images are on `device`, where they are scored as
    well; what it returns comes back in a list, a pair an item. Several ranks share the pairs, and all get everything.
    The network is put in eval mode and back. `how` is that of `restore_8bit`.
    """
    was_training = network.training
    network.eval()
    found = []
    with replaying(network, device):
        for path in ranks.share(paths):
            O, B = (image.to(device) for image in read_whole(path))
            restored = restore_8bit(network, O, device, *how)
            rows = [scores(image, B) for image in (O, *restored)]
            found.append(([[row[name] for name in METRICS] for row in rows], each(path, O, restored, B, rows)))
    network.train(was_training)
    found = ranks.gather(found)
    return np.array([table for table, _ in found]), [result for _, result in found]

"""Exported weights: what using a trained network needs, as one small file; the mean of several checkpoints."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.console import log
from base.errors import BadArgument, Mismatch, Occupied
from base.files import ROOT
from runs import checkpoints
from runs.checkpoints import Checkpoint
from runs.restore import open_network
from settings import map_paths, override, resolve

ARGUMENTS = ("run", "data_dir", "stage_num", "model_dir", "log_level")  # that -a export takes


def export(names: list[str], overrides: dict[str, Any]) -> None:
    """`-a export`: the weights and settings of a checkpoint as a file of model_dir, which `-m` takes by its name.

    Of several checkpoints of one architecture, the mean of their weights and the settings of the first. `--run` is the
    file's name, `--data_dir` the data set that it is tested on by default, `--stage_num` its number of stages.
    """
    if strange := overrides.keys() - set(ARGUMENTS):
        raise BadArgument(f"-a export takes --run, --data_dir, --stage_num and --model_dir, not --{min(strange)}")
    settings = resolve(overrides=overrides)
    source, *others = (checkpoints.find(name, Path(settings.model_dir)) for name in names)
    if others and not overrides.get("run"):
        raise BadArgument("the mean of several checkpoints needs a name: --run NAME")
    own_name = source.stem if source.parent == Path(settings.model_dir) else source.parent.name
    path = Path(settings.model_dir) / f"{overrides.get('run', own_name)}.pth"
    if path.is_file() and not overrides.get("run"):
        raise Occupied(f"{path} exists: give another name with --run, or this one to replace it")
    changes = {name: value for name, value in overrides.items() if name in ("data_dir", "stage_num")}
    if "stage_num" in changes:
        open_network(None, str(source), changes)  # raises Mismatch where the stages have weights of their own
    step = write_export(source, path, changes, others)
    data = path.read_bytes()
    log.info(f"{' + '.join(map(str, [source, *others]))} (step {step}): {len(data) / 1000:.0f} kB")
    log.info(f"{hashlib.sha256(data).hexdigest()}  {path.name}")


def write_export(source: Path, path: Path, changes: dict[str, Any], others: Sequence[Path] = ()) -> int:
    """Write the weights and settings of checkpoint `source` to `path`; returns the step of `source`.

    The weights are the averaged ones if there are any, or the mean of these and those of the `others`. `changes` change
    the settings. Folders outside the repository, which belong to one machine, are left out. Raises Mismatch for a
    checkpoint without settings, for more stages than were trained, and for others of another architecture.
    """
    checkpoint = checkpoints.load(source)
    if not checkpoint.settings:
        raise Mismatch(f"{source} is the published code's, which holds no settings: train on from it first")
    stages = checkpoint.settings.stage_num
    if changes.get("stage_num", 0) > stages:
        raise Mismatch(f"{source} was trained with {stages} stages: with more, the outputs diverge")
    places = map_paths(checkpoint.settings, lambda place: place if Path(place).is_relative_to(ROOT) else "")
    places = {name: tuple(filter(None, v)) if isinstance(v, tuple) else v for name, v in places.items()}
    settings = override(checkpoint.settings, {**places, **changes, "run": path.stem})
    weights = _mean_weights([source, *others]) if others else checkpoint.average or checkpoint.network
    checkpoints.save(path, Checkpoint(weights, checkpoint.step, settings))
    return checkpoint.step


def _mean_weights(paths: list[Path]) -> dict[str, Tensor]:
    loaded = map(checkpoints.load, paths)
    first, *others = ((checkpoint.average or checkpoint.network) for checkpoint in loaded)
    for path, weights in zip(paths[1:], others, strict=True):
        if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in first.items()}:
            raise Mismatch(f"{path} and {paths[0]} have two architectures, whose weights have no mean")
    mean = {name: torch.stack([weights[name].double() for weights in (first, *others)]).mean(0) for name in first}
    return {name: weight.to(first[name].dtype) for name, weight in mean.items()}

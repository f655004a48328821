"""Checkpoints: written whole or not at all, read without running code, found by name."""

import dataclasses
import io
import pickle
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from base.errors import UserError
from base.files import ROOT, write_bytes
from settings import Settings, from_dict, map_paths, override, to_dict

FORMAT = 1


@dataclass
class Checkpoint:
    """Everything that is needed to go on as if never stopped; the learning rate follows from settings and step."""

    network: dict[str, torch.Tensor]
    step: int = 0
    settings: Settings | None = None  # None: a checkpoint of the published code
    optimizer: dict[str, Any] | None = None
    random: dict[str, Any] | None = None  # PyTorch's generators; the crops' are functions of the step
    best_psnr: float | None = None  # of the validation so far, dB
    seconds: float = 0.0  # that the training has taken, over all its sessions
    device: str = ""  # that it was on in the last one
    average: dict[str, torch.Tensor] | None = None  # moving average of the network's weights
    criterion: dict[str, torch.Tensor] | None = None  # what the loss has learnt beside the network
    versions: dict[str, str] = field(default_factory=dict)


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint: temporary file, sync, rename. Raises UserError where it can't; the old file stays then."""
    values = {field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)}
    values["settings"] = checkpoint.settings and to_dict(checkpoint.settings)
    values["versions"] = {"torch": str(torch.__version__), "python": platform.python_version()}
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **values}, buffer)
    write_bytes(path, buffer.getvalue())


def load(path: Path) -> Checkpoint:
    """Read a checkpoint of this program, or of the published one (`net`, `clock`, `opt`), onto the CPU.

    Raises UserError where the file holds code, is cut off, or is something else.
    """
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds more than weights: another kind of file, or code, which isn't run") from None
    except Exception as error:  # torch.load raises whatever its readers meet: zip, pickle, storage errors
        raise UserError(f"{path} is no checkpoint, or is cut off ({type(error).__name__})") from None
    if isinstance(values, dict) and {"net", "clock"} <= values.keys():
        return Checkpoint(values["net"], int(values["clock"]), optimizer=values.get("opt"))
    if not isinstance(values, dict) or not {"format", "network", "settings", "step"} <= values.keys():
        raise UserError(f"{path} is no checkpoint of this program")
    if values["format"] > FORMAT:
        raise UserError(f"{path} was written by a newer version of this program: update it")
    stages = values.get("stages")  # an older version doubled the stages at some steps: so many were trained by then
    known = {field.name for field in dataclasses.fields(Checkpoint)}  # a later version may add others
    values = {key: value for key, value in values.items() if key in known}
    values["settings"] = values["settings"] and from_dict(values["settings"])
    if stages:
        values["settings"] = override(values["settings"], {"stage_num": stages})
    return Checkpoint(**values)


def export(source: Path, path: Path, overrides: dict[str, Any], others: Sequence[Path] = ()) -> Checkpoint:
    """Write what is needed to use the network of `source`, not to go on with its training: weights and settings.

    The weights are the averaged ones where there are any, or the mean of these and those of the `others` ("model
    soup"); `overrides` change the settings, which are those of `source`. Folders that lie outside the repository, which
    say something of one machine only, are left out. Raises UserError as `load` and `save` do, for more stages than were
    trained, and for others of another architecture.
    """
    whole = load(source)
    if not whole.settings:
        raise UserError(f"{source} is the published code's, which holds no settings: train on from it first")
    stages = whole.settings.stage_num
    if overrides.get("stage_num", 0) > stages:
        raise UserError(f"{source} was trained with {stages} stages: with more, its images come apart")
    places = map_paths(whole.settings, lambda place: place if Path(place).is_relative_to(ROOT) else "")
    places = {name: tuple(filter(None, v)) if isinstance(v, tuple) else v for name, v in places.items()}
    changes = {**places, **overrides, "run": path.stem}
    settings = override(whole.settings, changes)
    save(path, Checkpoint(_mean_weights(source, whole, others), whole.step, settings))
    return whole


def _mean_weights(source: Path, whole: Checkpoint, others: Sequence[Path]) -> dict[str, Tensor]:
    weights = whole.average or whole.network
    if not others:
        return weights
    several = [weights]
    for other in others:
        loaded = load(other)
        several.append(loaded.average or loaded.network)
        first, last = ({name: tensor.shape for name, tensor in each.items()} for each in (weights, several[-1]))
        if first != last:
            raise UserError(f"{other} and {source} are of two architectures, which have no mean")
    mean = {name: torch.stack([each[name].double() for each in several]).mean(0) for name in weights}
    return {name: tensor.to(weights[name].dtype) for name, tensor in mean.items()}


def find(name: str, model_dir: Path) -> Path:
    """The file of a checkpoint: a path, a run (its best, or latest), or a file of `model_dir` (`.pth` may be left off).

    A run of one's own goes before shipped weights of the same name. Raises UserError with a list of what there is.
    """
    folder = model_dir / name
    for path in (Path(name), folder, folder / "best.pth", folder / "latest.pth", model_dir / f"{name}.pth"):
        if path.is_file():
            return path
    there = sorted(str(path.relative_to(model_dir).with_suffix("")) for path in model_dir.rglob("*.pth"))
    if not there:
        raise UserError(f"no checkpoint {name!r} in {model_dir}: there is none yet, main.py -a train makes one")
    more = f" and {len(there) - 20} more" if len(there) > 20 else ""
    raise UserError(f"no checkpoint {name!r} in {model_dir}: there are {', '.join(there[:20])}{more}")


def load_weights(network: nn.Module, checkpoint: Checkpoint, path: Path, average: bool = False) -> None:
    """Put a checkpoint's weights, or their `average` if it has one, into a network.

    Raises UserError where they belong to another architecture.
    """
    wanted, given = network.state_dict(), (checkpoint.average if average else None) or checkpoint.network
    wrong = sorted(wanted.keys() ^ given.keys())
    wrong += [name for name in wanted if name in given and wanted[name].shape != given[name].shape]
    if wrong:
        raise UserError(
            f"{path} belongs to another network ({wrong[0]} and {len(wrong) - 1} more differ): "
            "choose the preset and settings that it was trained with"
        )
    network.load_state_dict(given)

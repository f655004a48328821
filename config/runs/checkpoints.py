"""Checkpoints: written whole or not at all, read without running code, found by name."""

import dataclasses
import io
import pickle
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.errors import DamagedFile, Mismatch, MissingFile
from base.files import write_bytes
from settings import Settings, from_dict, override, to_dict

FORMAT = 1
LISTED = 20  # checkpoints that an error names


@dataclass
class Checkpoint:
    """All that a training needs to resume as if it had never stopped.

    The learning rate follows from settings and step. The crops are functions of seed and step.
    """

    network: dict[str, torch.Tensor]
    step: int = 0
    settings: Settings | None = None  # None: a checkpoint of the published code
    optimizer: dict[str, Any] | None = None  # None: exported weights
    random: dict[str, Any] | None = None  # states of PyTorch's generators: cpu, cuda
    best_psnr: float | None = None  # of the validations so far, dB
    seconds: float = 0.0  # of training, over all its sessions
    device: str = ""  # of the last session
    average: dict[str, torch.Tensor] | None = None  # moving average of the network's weights
    criterion: dict[str, torch.Tensor] | None = None  # weights that the loss has learnt
    versions: dict[str, str] = field(default_factory=dict)


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint. Raises NotWritable where that fails, and leaves the old file as it was."""
    values = {field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)}
    values["settings"] = checkpoint.settings and to_dict(checkpoint.settings)
    values["versions"] = {"torch": str(torch.__version__), "python": platform.python_version()}
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **values}, buffer)
    write_bytes(path, buffer.getvalue())


def load(path: Path) -> Checkpoint:
    """Read a checkpoint of this program, or of the published one (`net`, `clock`, `opt`), onto the CPU.

    Raises DamagedFile where the file holds code, is cut off, or is something else.
    """
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DamagedFile(f"{path} holds more than weights: another kind of file, or code, which isn't run") from None
    except Exception as error:  # torch.load raises whatever its readers meet: zip, pickle, storage errors
        raise DamagedFile(f"{path} is no checkpoint, or is cut off ({type(error).__name__})") from None
    if isinstance(values, dict) and {"net", "clock"} <= values.keys():
        return Checkpoint(values["net"], int(values["clock"]), optimizer=values.get("opt"))
    if not isinstance(values, dict) or not {"format", "network", "settings", "step"} <= values.keys():
        raise DamagedFile(f"{path} is no checkpoint of this program")
    if values["format"] > FORMAT:
        raise DamagedFile(f"{path} was written by a newer version of this program: update it")
    stages = values.get("stages")  # a former version raised the number of stages while it trained: the number so far
    known = {field.name for field in dataclasses.fields(Checkpoint)}  # a later version may add others
    values = {key: value for key, value in values.items() if key in known}
    values["settings"] = values["settings"] and from_dict(values["settings"])
    if stages:
        values["settings"] = override(values["settings"], {"stage_num": stages})
    return Checkpoint(**values)


def find(name: str, model_dir: Path) -> Path:
    """The file of a checkpoint: a path, a run (its best, or latest), or a file of `model_dir` (`.pth` may be left off).

    A run of one's own takes precedence over pretrained weights of that name. Raises MissingFile with a list of what
    there is.
    """
    folder = model_dir / name
    for path in (Path(name), folder, folder / "best.pth", folder / "latest.pth", model_dir / f"{name}.pth"):
        if path.is_file():
            return path
    known = sorted(str(path.relative_to(model_dir).with_suffix("")) for path in model_dir.rglob("*.pth"))
    if not known:
        raise MissingFile(f"no checkpoint {name!r} in {model_dir}: there is none yet, main.py -a train makes one")
    more = f" and {len(known) - LISTED} more" if len(known) > LISTED else ""
    raise MissingFile(f"no checkpoint {name!r} in {model_dir}: there are {', '.join(known[:LISTED])}{more}")


def load_weights(network: nn.Module, checkpoint: Checkpoint, path: Path, average: bool = False) -> None:
    """Put a checkpoint's weights, or their `average` if it has one, into a network.

    Raises Mismatch where they belong to another architecture.
    """
    own, given = network.state_dict(), (checkpoint.average if average else None) or checkpoint.network
    wrong = sorted(own.keys() ^ given.keys())
    wrong += [name for name in own if name in given and own[name].shape != given[name].shape]
    if wrong:
        raise Mismatch(
            f"{path} belongs to another network ({wrong[0]} and {len(wrong) - 1} more differ): "
            "choose the preset and settings that it was trained with"
        )
    network.load_state_dict(given)

"""What the file of a checkpoint may hold: this program's fields, the published code's, or another program's weights."""

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.errors import DamagedFile, MissingFile, NotFinite

FORMAT = 1
WRAPPERS = (
    "params_ema",
    "params",
    "state_dict",
    "model_state_dict",
    "model",
    "net",
)  # names that other programs give to their weights
WEIGHTS = ("network", "average", "criterion")
WEIGHT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
LARGEST = 2**63  # of a number


def _is_weight(value: Any) -> bool:
    plain = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
    return plain and value.dtype in WEIGHT_TYPES


def _is_weights(value: Any) -> bool:
    return _is_dict(value) and all(map(_is_weight, value.values()))


def _is_random(value: Any) -> bool:
    states = [*value.values()] if _is_dict(value) and "cpu" in value else [None]
    return all(isinstance(state, Tensor) and state.dtype == torch.uint8 for state in states)


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST


KINDS: dict[str, Callable[[Any], bool]] = {
    **{"format": _is_count, "network": _is_weights, "step": _is_count},  # the others may be missing, or None
    **{"settings": _is_dict, "stages": _is_count, "optimizer": _is_dict, "random": _is_random},
    **{"average": _is_weights, "criterion": _is_weights, "versions": _is_dict},
    "best_psnr": lambda value: isinstance(value, float) or _is_count(value),
    "seconds": lambda value: type(value) in (int, float) and 0 <= value < LARGEST,
    "device": lambda value: isinstance(value, str),
}


def read(path: Path) -> dict[str, Any]:
    """The fields of the `Checkpoint` in a file, without those that are None; settings as they are stored.

    Code in the file is not run. Raises MissingFile, DamagedFile where the file is cut off or a field is of another kind
    than it should be, NotFinite where a weight is infinite or nan.
    """
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():  # torch.load compares no checksum
            raise ValueError("checksum")
    except (FileNotFoundError, PermissionError) as error:
        raise MissingFile(f"can't read {path}: {error.strerror}") from None
    except Exception as error:  # torch.load raises whatever its readers meet: zip, pickle, storage errors
        kind = type(error).__name__
        raise DamagedFile(f"{path} is no checkpoint, is damaged, or holds code, which isn't run ({kind})") from None
    own = isinstance(values, dict) and {"format", "settings"} <= values.keys()
    if own and _is_count(values["format"]) and values["format"] > FORMAT:
        raise DamagedFile(f"{path} was written by a newer version of this program: update it")
    values = values if own else _of_another_program(values)
    fields: dict[str, Any] = {name: values.get(name) for name in KINDS}  # a later version may add others
    for name, is_right in KINDS.items():
        value, needed = fields[name], name in ("format", "network", "step")
        if (needed or value is not None) and not is_right(value):
            raise DamagedFile(f"{path} is damaged, or no checkpoint: its {name} is missing or of another kind")
    for name in WEIGHTS:
        if fields[name]:
            fields[name] = _plain_names(fields[name])
            _check_finite(fields[name], path)
    return {name: value for name, value in fields.items() if value is not None}


def _of_another_program(values: Any) -> dict[str, Any]:
    """The fields of a checkpoint of the published code (`net`, `clock`, `opt`), or of weights, wrapped or alone."""
    if not isinstance(values, dict):
        return {}
    if {"net", "clock"} <= values.keys():
        clock = values["clock"]["step"] if _is_dict(values["clock"]) and "step" in values["clock"] else values["clock"]
        return {"format": FORMAT, "network": values["net"], "step": clock, "optimizer": values.get("opt")}
    wrapped = [values[name] for name in WRAPPERS if isinstance(values.get(name), dict)]
    weights = wrapped[0] if wrapped else values
    return {"format": FORMAT, "network": weights or None, "step": 0}


def _plain_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights without what DataParallel and AveragedModel (`module.`) and compiling (`_orig_mod.`) add to names."""
    plain = ((re.sub(r"^(module\.)+", "", name.replace("_orig_mod.", "")), w) for name, w in weights.items())
    return {name: weight for name, weight in plain if name != "n_averaged"}


def _check_finite(weights: dict[str, Tensor], path: Path) -> None:
    for name, weight in weights.items():
        if not weight.float().isfinite().all():  # as float32, in which the network computes
            raise NotFinite(f"{name} in {path} is not finite: take another checkpoint of the run, or download it again")

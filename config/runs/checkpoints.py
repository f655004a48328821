"""Checkpoints: written whole or not at all, read without running code, found by name; starts of trainings; exports."""

import io
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import model
from base import ranks
from base.console import log
from base.errors import BadArgument, DamagedFile, Mismatch, MissingFile, Occupied
from base.files import ROOT, write_bytes
from cal_ssim import LARGEST_PSNR
from networks.base import Network
from runs import formats
from runs.formats import FORMAT
from settings import FIELDS, NETWORK_FIELDS, Settings, from_dict, map_paths, override, resolve, to_dict

MOST_PARAMETERS = 10**8
OTHER_VALIDATION = {"data_dir", "val_images", "stage_num"}  # with these changed, PSNRs are not those of before
EXPORT_FIELDS = ("run", "data_dir", "stage_num", "model_dir", "log_level")  # settings that `export` takes


@dataclass
class Checkpoint:
    """All that a training needs to resume; the learning rate and the crops follow from settings and step."""

    network: dict[str, torch.Tensor]
    step: int = 0
    settings: Settings | None = None  # None: a checkpoint of another program, such as the published code
    optimizer: dict[str, Any] | None = None  # None: exported weights
    random: dict[str, Any] | None = None  # states of PyTorch's generators: cpu, cuda
    best_psnr: float | None = None  # of the validations so far, dB
    seconds: float = 0.0  # of training, over all its sessions
    device: str = ""  # of the last session
    average: dict[str, torch.Tensor] | None = None  # moving average of the network's weights
    criterion: dict[str, torch.Tensor] | None = None  # weights that the loss has learnt
    versions: dict[str, str] = field(default_factory=dict)

    def weights(self, average: bool) -> dict[str, torch.Tensor]:
        """The network's weights, or their `average` if there is one."""
        return (self.average if average else None) or self.network


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint. Raises NotWritable where that fails, and leaves the old file as it was."""
    settings = checkpoint.settings and to_dict(checkpoint.settings)
    versions = {"torch": str(torch.__version__), "python": platform.python_version()}
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **vars(checkpoint), "settings": settings, "versions": versions}, buffer)
    write_bytes(path, buffer.getvalue())


def load(path: Path) -> Checkpoint:
    """Read a checkpoint of this program, of the published one, or another's weights, onto the CPU; see `formats.read`.

    Raises DamagedFile where its fields or settings are not possible, NotFinite where its weights are not finite.
    """
    fields = formats.read(path)
    fields.pop("format")
    settings, stages = fields.pop("settings", None), fields.pop("stages", None)
    try:
        if settings is not None:
            settings = from_dict(settings)
        if settings and stages:  # trained so far, where these are fewer than the settings' stage_num
            settings = override(settings, {"stage_num": stages})
    except BadArgument as error:
        reason = " ".join(str(error).split())  # the value in it may be printed in several lines
        raise DamagedFile(f"{path} holds settings that are not possible: {reason}") from None
    if not fields.get("best_psnr", 0) <= LARGEST_PSNR:
        del fields["best_psnr"]  # which no validation would exceed
    return Checkpoint(settings=settings, **fields)


def find(name: str, model_dir: Path) -> Path:
    """The file of a checkpoint: a path, a run (its best, or latest), or a file of `model_dir` (`.pth` may be left off).

    Relative paths start at the working directory or the repository. Raises MissingFile, or BadArgument where a run and
    a file have that name.
    """
    runs, files = run_states(name, model_dir), (Path(name), ROOT / name, model_dir / name, model_dir / f"{name}.pth")
    found = [path for path in (*runs[:1], *files) if os.path.isfile(path)]  # False for a name that is too long
    if runs and found[1:]:
        raise BadArgument(f"-m {name} may be the run, {found[0]}, or {found[1]}: name the file")
    if found:
        return found[0]
    known = {path.relative_to(model_dir).with_suffix("").parts[0] for path in model_dir.rglob("*.pth")}
    there = f"there are {', '.join(sorted(known))}" if known else "there is none yet, main.py -a train makes one"
    raise MissingFile(f"no checkpoint {name!r} in {model_dir}: {there}")


def run_states(run: str, model_dir: Path) -> list[Path]:
    """The files of a run that stand for it: best.pth and latest.pth, if they exist."""
    return [path for path in (model_dir / run / "best.pth", model_dir / run / "latest.pth") if os.path.isfile(path)]


def find_run(run: str, model_dir: Path) -> Path:
    """The best state of a run, or its latest. Raises MissingFile."""
    if not (states := run_states(run, model_dir)):
        raise MissingFile(f"there is no run {run!r} in {model_dir}: -a train makes one, -m names weights")
    return states[0]


def build(settings: Settings, checkpoint: Checkpoint | None, path: Path, average: bool = False) -> Network:
    """The network of these settings, with the weights of the `checkpoint` at `path` if there is one.

    Raises BadArgument for a network that no memory holds and Mismatch for weights of another, both before it is made.
    """
    with torch.device("meta"):  # shapes without memory
        shapes = model.build(settings)
    if (size := model.count_parameters(shapes)) > MOST_PARAMETERS:
        raise BadArgument(f"these settings make a network of {size} parameters: lower --channel or --depth")
    if checkpoint:
        check_weights(shapes.state_dict(), checkpoint.weights(average), path)
    network = model.build(settings)
    if checkpoint:
        network.load_state_dict(checkpoint.weights(average))
    return network


def load_weights(network: nn.Module, checkpoint: Checkpoint, path: Path, average: bool = False) -> None:
    """Put a checkpoint's weights, or their `average` if it has one, into a network. Raises Mismatch."""
    check_weights(network.state_dict(), checkpoint.weights(average), path)
    network.load_state_dict(checkpoint.weights(average))


def check_weights(own: dict[str, torch.Tensor], given: dict[str, torch.Tensor], path: Path) -> None:
    """Raise Mismatch where the weights `given` by the file `path` are not those of one's `own` names and shapes."""
    wrong = sorted(own.keys() ^ given.keys())
    wrong += [name for name in own if name in given and own[name].shape != given[name].shape]
    if wrong:
        raise Mismatch(f"{path} belongs to another network ({wrong[0]} differs): choose its preset and settings")


def check_network(path: Path, trained: Settings, requested: Settings, may_differ: set[str]) -> None:
    """Raise Mismatch where the `requested` settings describe another network than that of the checkpoint at `path`."""
    for name in NETWORK_FIELDS:
        own, other = getattr(trained, name), getattr(requested, name)
        if own != other and name not in may_differ:
            advice = "leave -p out, or name another checkpoint with -m or another run with --run"
            raise Mismatch(f"{path} was trained with {name} {own}, not {other}: {advice}")


class Start(NamedTuple):
    settings: Settings
    checkpoint: Checkpoint | None  # None: random weights
    source: Path  # the checkpoint's file
    changes: list[str]  # settings that differ from the checkpoint's, in words


def choose_start(preset: str | None, name: str | None, overrides: dict[str, Any]) -> Start:
    """What `-a train` with these arguments starts from; `name` is -m's.

    - No `name`, or a run's: that run's latest.pth, where it resumes, or random weights if there is none.
    - Another checkpoint: a run that has none of its own (--run) resumes there.
    - Exported weights, which have no optimizer's state: a new training, with the network's settings alone.
    """
    settings = resolve(preset or "sdsen", overrides)
    if not preset and "run" not in overrides and (run := _run_named(name or "", Path(settings.model_dir))):
        name, settings = None, override(settings, {"run": run})
    latest, weights = settings.model_path / "latest.pth", Path(settings.model_dir) / f"{settings.run}.pth"
    if weights.is_file():
        raise Occupied(f"{weights} has the name of this run: name the run with --run")
    source = ranks.from_first(lambda: _find_source(settings, latest, name))
    checkpoint = ranks.from_first(lambda: load(source) if source.is_file() else None)
    if checkpoint is None or checkpoint.settings is None:  # none, or another program's, which holds no settings
        return Start(settings, checkpoint, source, [])
    old, resumes = checkpoint.settings, checkpoint.optimizer is not None
    if not resumes:
        old = override(resolve(preset or "sdsen"), {field: getattr(old, field) for field in NETWORK_FIELDS})
    settings = override(old, {"run": settings.run, "model_dir": settings.model_dir, **overrides})
    # All stages have the same weights, so that their number may change, but only by --stage_num itself.
    requested = resolve(preset, overrides) if preset else settings
    check_network(source, old, requested, may_differ={"stage_num"} & overrides.keys())
    if resumes and settings.optimizer != old.optimizer:
        raise Mismatch(f"{source} holds {old.optimizer}'s state, not {settings.optimizer}'s: start from its -a export")
    changed = [field for field in FIELDS if getattr(settings, field) != getattr(old, field)]
    if source != latest or OTHER_VALIDATION & set(changed):
        checkpoint.best_psnr = None
    changes = [f"{field} {getattr(old, field)!r} is now {getattr(settings, field)!r}" for field in changed]
    return Start(settings, checkpoint, source, changes)


def _run_named(name: str, model_dir: Path) -> str:
    """The run that -m NAME or -m NAME/latest names; empty where it names something else."""
    run = name.removesuffix(".pth").removesuffix("/latest") if "/" in name else name
    return run if run and "/" not in run and os.path.isfile(model_dir / run / "latest.pth") else ""


def _find_source(settings: Settings, latest: Path, name: str | None) -> Path:
    source = find(name, Path(settings.model_dir)) if name else latest
    if name and latest.is_file() and not source.samefile(latest):
        raise Occupied(f"run {settings.run} has a checkpoint of its own, {latest}: name another run with --run")
    return source


def export(names: list[str], overrides: dict[str, Any]) -> None:
    """`-a export`: the weights and settings of a checkpoint as a file of model_dir, which `-m` takes by its name.

    Of several checkpoints of one architecture, the mean of their weights and the settings of the first. `--run` is the
    file's name (RUN_stepN by default), `--data_dir` the data set that it is tested on by default, `--stage_num` its
    number of stages. Folders outside the repository, which belong to one machine, are left out. Raises Occupied where a
    run has the file's name.
    """
    if strange := overrides.keys() - {*EXPORT_FIELDS}:
        raise BadArgument(f"-a export takes {', '.join(f'--{name}' for name in EXPORT_FIELDS)}, not --{min(strange)}")
    model_dir, run = Path(resolve(overrides=overrides).model_dir), overrides.get("run")
    sources = [find(name, model_dir) for name in names]
    if len(sources) > 1 and not run:
        raise BadArgument("the mean of several checkpoints needs a name: --run NAME")
    first, loaded = sources[0], [load(source) for source in sources]
    path = model_dir / f"{run or f'{first.parent.name}_step{loaded[0].step}'}.pth"
    if path.is_file() or (not run and first.parent == model_dir):
        raise Occupied(f"{path if path.is_file() else first} exists: name another file with --run, or move it away")
    if run_states(path.stem, model_dir):
        raise Occupied(f"{path.stem} is the name of a run: name the file with --run")
    if not (trained := loaded[0].settings):
        raise Mismatch(f"{first} holds no settings, as it is another program's: train on from it first")
    changes = {name: value for name, value in overrides.items() if name in ("data_dir", "stage_num")}
    if changes.get("stage_num", 0) > trained.stage_num:
        raise Mismatch(f"{first} was trained with {trained.stage_num} stages: with more, the outputs diverge")
    inside = map_paths(trained, lambda place: place if Path(place).is_relative_to(ROOT) else "")
    inside = {name: tuple(filter(None, v)) if isinstance(v, tuple) else v for name, v in inside.items()}
    settings = override(trained, {**inside, **changes, "run": path.stem})
    weights = []
    for source, checkpoint in zip(sources, loaded, strict=True):
        weights.append(
            build(settings, checkpoint, source, average=True).state_dict()
        )  # raises Mismatch for another one
    mean = {}
    for name, weight in weights[0].items():
        mean[name] = torch.stack([each[name].double() for each in weights]).mean(0).to(weight.dtype)
    save(path, Checkpoint(mean, loaded[0].step, settings))
    log.info(f"{path}, {path.stat().st_size / 1000:.0f} kB: {' + '.join(map(str, sources))} (step {loaded[0].step})")

"""What a training starts from: which settings, which checkpoint, and what may differ from the checkpoint's."""

from pathlib import Path
from typing import Any, NamedTuple

from base import ranks
from base.errors import Mismatch, Occupied
from runs import checkpoints
from runs.checkpoints import Checkpoint
from settings import FIELDS, NETWORK_FIELDS, Settings, override, resolve

OTHER_VALIDATION = {"data_dir", "val_images", "stage_num"}  # with these changed, PSNRs are not those of before


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
    latest = settings.model_path / "latest.pth"
    source, checkpoint = ranks.from_first(lambda: _find(settings, latest, name))
    if checkpoint is None or checkpoint.settings is None:  # none, or the published code's, which holds no settings
        return Start(settings, checkpoint, source, [])
    resumes = checkpoint.optimizer is not None
    old = checkpoint.settings if resumes else _network_alone(checkpoint.settings, preset)
    settings = override(old, {"run": settings.run, "model_dir": settings.model_dir, **overrides})
    requested = resolve(preset, overrides) if preset else settings
    _refuse_other_network(source, old, requested, overrides)
    if resumes and settings.optimizer != old.optimizer:
        raise Mismatch(
            f"{source} holds the state of {old.optimizer}, not of {settings.optimizer}: "
            "export it with -a export and start from these weights"
        )
    changed = [field for field in FIELDS if getattr(settings, field) != getattr(old, field)]
    if source != latest or OTHER_VALIDATION & set(changed):
        checkpoint.best_psnr = None
    changes = [f"{field} {getattr(old, field)!r} is now {getattr(settings, field)!r}" for field in changed]
    return Start(settings, checkpoint, source, changes)


def _run_named(name: str, model_dir: Path) -> str:
    """The run that -m NAME or -m NAME/latest names; empty where it names something else."""
    run, _, file = name.partition("/")
    is_run = run and file in ("", "latest", "latest.pth") and (model_dir / run / "latest.pth").is_file()
    return run if is_run else ""


def _find(settings: Settings, latest: Path, name: str | None) -> tuple[Path, Checkpoint | None]:
    source = checkpoints.find(name, Path(settings.model_dir)) if name else latest
    if name and latest.is_file() and not source.samefile(latest):
        raise Occupied(f"run {settings.run} has a checkpoint of its own, {latest}: name another run with --run")
    return source, checkpoints.load(source) if source.is_file() else None


def _network_alone(trained: Settings, preset: str | None) -> Settings:
    """The preset's settings, with the network of exported weights."""
    network = {field: getattr(trained, field) for field in NETWORK_FIELDS}
    return override(resolve(preset or "sdsen"), network)


def _refuse_other_network(source: Path, old: Settings, requested: Settings, overrides: dict[str, Any]) -> None:
    """Raise Mismatch where another network than the checkpoint's is requested.

    The number of stages may change, as all stages have the same weights, but only by --stage_num itself.
    """
    for field in NETWORK_FIELDS:
        if getattr(requested, field) == getattr(old, field) or (field == "stage_num" and field in overrides):
            continue
        raise Mismatch(
            f"{source} was trained with {field} {getattr(old, field)}, not {getattr(requested, field)}: "
            f"name another run with --run{', or give --stage_num' * (field == 'stage_num')}"
        )

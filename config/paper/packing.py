"""Runs in one zip file, so that a training that was cut off resumes on another machine.

An archive has the members NAME/latest.pth (the last state), NAME/best.pth (where that is what will be tested),
NAME/train.log, NAME/tables.log and NAME/settings.json. What is read from one may be of any origin: only these names of
known runs are taken, of bounded size, and a state is loaded as weights, never as code.
"""

import io
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from base.console import log
from base.errors import UserError
from base.files import lock, write_bytes
from runs import checkpoints
from runs.checkpoints import Checkpoint
from settings import NETWORK_FIELDS, Settings

SECONDS = 60  # at least, between two archives of running trainings
LARGEST_MEMBER, LARGEST_ARCHIVE = 2**26, 2**30  # bytes, unpacked; all files of a run take less than 6 MB


class Run(NamedTuple):
    """A run that an archive may hold, and its folders here."""

    settings: Settings
    has_best: bool  # whether its best checkpoint is needed too
    recipe: Sequence[str]  # the settings that all its states share

    @property
    def name(self) -> str:
        return self.settings.run

    @property
    def files(self) -> dict[str, Path]:
        """The files here by their names in the archive.

        They are written in this order and read in the other one, so that a state comes after all that belongs to it,
        and a log is at least as far as the state beside it.
        """
        best = {"best.pth": self.settings.model_path / "best.pth"} if self.has_best else {}
        logs = {name: self.settings.log_path / name for name in ("settings.json", "tables.log", "train.log")}
        return {**best, **logs, "latest.pth": self.settings.model_path / "latest.pth"}

    def state(self) -> Checkpoint | None:
        """The last state of the run here, if there is one."""
        path = self.files["latest.pth"]
        return checkpoints.load(path) if path.is_file() else None


Find = Callable[[str], Run | None]  # the run of a name, None where no run has that name
Files = dict[str, bytes]  # of a run, by their names


def difference(names: Sequence[str], a: Settings, b: Settings | None) -> str | None:
    """The first of these settings that differs; None where all are alike."""
    return next((name for name in names if getattr(a, name) != getattr(b, name, None)), None)


# ---------------------------------------------------------------- writing


class Archive:
    """An archive of some runs. What it holds of others stays in it."""

    def __init__(self, path: Path, runs: list[Run], find: Find):
        """Raises UserError where the file is no archive, or holds more of a run than there is here."""
        self.path, self.runs = path, runs
        self.contents = read(path, find) if path.exists() else {}
        self.packed: dict[str, int] = {}  # the times of the states in it
        self.packed_at = float("-inf")
        for run in [run for run in runs if run.name in self.contents]:
            here, packed = run.state(), packed_state(run, self.contents[run.name], path)
            if not here or here.step < packed.step or difference(run.recipe, here.settings, packed.settings):
                raise UserError(
                    f"{path} holds {run.name} at step {packed.step}, which the run here does not go on from: --take it "
                    "first, or --pack into another file"
                )

    def keep_current(self) -> None:
        """Write the archive if a state has changed, SECONDS after the last time at the earliest."""
        if time.monotonic() - self.packed_at < SECONDS or self._times() == self.packed:
            return
        try:
            self.write()
        except UserError as error:  # the trainings run on, and the next minute tries again
            log.warning(str(error))

    def write(self) -> None:
        """Write the archive, whole or not at all. Raises UserError where a file is too large to be taken again."""
        times, self.packed_at = self._times(), time.monotonic()
        for run in [run for run in self.runs if run.name in times]:
            files = {name: path.read_bytes() for name, path in reversed(run.files.items()) if path.is_file()}
            for name, data in files.items():
                _check_size(len(data), LARGEST_MEMBER, f"{run.files[name]}")
            self.contents[run.name] = files
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for run, files in self.contents.items():
                for name, data in files.items():
                    archive.writestr(f"{run}/{name}", data)
        if self.contents:
            write_bytes(self.path, buffer.getvalue())
        self.packed = times

    def _times(self) -> dict[str, int]:
        states = {run.name: run.files["latest.pth"] for run in self.runs}
        return {name: path.stat().st_mtime_ns for name, path in states.items() if path.is_file()}


# ---------------------------------------------------------------- reading


def take(path: Path, find: Find) -> None:
    """Put the runs of an archive of any origin into their folders here, but those that are as far here already.

    Raises UserError, before anything is written, where the archive holds anything but the states and logs of known
    runs, where a process trains one of them, and where the run here is of another recipe.
    """
    wanted = []
    with ExitStack() as claims:
        for name, files in read(path, find).items():
            run = find(name)
            packed = packed_state(run, files, path)
            claims.enter_context(_claimed(run))
            if _is_behind(run, packed, path):
                wanted.append((run, files, packed.step))
        for run, files, step in wanted:
            _write_run(run, files)
            log.info(f"{run.name}: step {step}, from {path}")


def _is_behind(run: Run, packed: Checkpoint, archive: Path) -> bool:
    """Whether the run here is behind its packed state. Raises UserError where it is so with another recipe."""
    here = run.state()
    if not here:
        return True
    if here.step >= packed.step:
        log.info(f"{run.name}: step {here.step} here, step {packed.step} in {archive}: the run here stays")
        return False
    if name := difference(run.recipe, here.settings, packed.settings):
        raise UserError(
            f"{run.files['latest.pth']} was trained with another {name} than {run.name} in {archive}: move one away"
        )
    return True


def _write_run(run: Run, files: Files) -> None:
    """Put a run's files into their places; a kill on the way leaves the old state, and taking again mends the rest."""
    if "best.pth" not in files:  # one that is here belongs to the state that is replaced
        (run.settings.model_path / "best.pth").unlink(missing_ok=True)
    for name, path in run.files.items():
        if name in files:
            write_bytes(path, files[name])


@contextmanager
def _claimed(run: Run) -> Iterator[None]:
    """Keep others from training a run meanwhile. Raises UserError where a process does already."""
    path = run.files["train.log"]
    if not path.is_file():
        yield
        return
    with open(path, "ab") as file:
        if not lock(file):
            raise UserError(f"run {run.name} is in training, by another process: stop it first")
        yield


def read(path: Path, find: Find) -> dict[str, Files]:
    """The files of each run in an archive of any origin. Raises UserError where it holds anything else."""
    runs: dict[str, Files] = {}
    left = LARGEST_ARCHIVE
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.is_dir():
                    continue
                name, _, file_name = member.filename.partition("/")
                run = find(name)
                if not run or file_name not in run.files:
                    raise UserError(f"{path} holds {member.filename!r}, which is no file of a row's run")
                limit = min(left, LARGEST_MEMBER)
                with archive.open(member) as file:
                    data = file.read(limit + 1)  # the size that the archive claims may be wrong
                _check_size(len(data), limit, f"{path}: {member.filename}")
                left -= len(data)
                runs.setdefault(name, {})[file_name] = data
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except Exception as error:  # zipfile raises whatever its readers meet
        raise UserError(f"{path} is no archive of runs, or is cut off ({type(error).__name__})") from None
    for name, files in runs.items():
        if "latest.pth" not in files:
            raise UserError(f"{path} holds no state of {name}")
    return runs


def packed_state(run: Run, files: Files, archive: Path) -> Checkpoint:
    """The last state of a run in an archive. Raises UserError where a state there is none of the run's network."""
    places = {name: f"{archive}: {run.name}/{name}" for name in files if name.endswith(".pth")}
    states = {name: _read_state(files[name], place) for name, place in places.items()}
    for name, state in states.items():
        if field := difference(NETWORK_FIELDS, run.settings, state.settings):
            raise UserError(f"{places[name]} is of another network, with another {field}")
    return states["latest.pth"]


def _read_state(data: bytes, place: str) -> Checkpoint:
    """A state that a training can resume from, out of bytes of any origin. Raises UserError where they are none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.pth"
        try:
            path.write_bytes(data)
            with zipfile.ZipFile(path) as parts:  # PyTorch's format, which compresses nothing
                _check_size(sum(part.file_size for part in parts.infolist()), len(data), place)
            state = checkpoints.load(path)
            if not (type(state.step) is int and state.step >= 0 and state.settings and state.optimizer):
                raise ValueError("weights alone")
        except UserError as error:
            raise UserError(str(error).replace(str(path), place)) from None
        except Exception as error:  # whatever such bytes make their readers raise
            raise UserError(f"{place} is no state that a training resumes from ({type(error).__name__})") from None
    return state


def _check_size(size: int, limit: int, what: str) -> None:
    if size > limit:
        raise UserError(f"{what} is too large for a file of a run: more than {limit} bytes")

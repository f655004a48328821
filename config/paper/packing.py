"""Runs of rows in one zip file, so that a training that was cut off resumes on another machine.

An archive may come from anywhere: only files of known runs are accepted, of bounded size, and checkpoints are loaded as
weights, never as code.
"""

import io
import time
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from base.console import log
from base.errors import DamagedFile, Mismatch, NotWritable, Occupied, UserError
from base.files import lock, write_bytes
from paper.rows import RECIPE_FIELDS, Row, Run, find_run, first_difference, parse_name
from runs import checkpoints
from runs.checkpoints import Checkpoint
from settings import NETWORK_FIELDS

SECONDS = 60  # at least, between two archives of running trainings
LARGEST = 2**26  # bytes of a file, unpacked; all files of a run take less than 6 MB


class PackedRun(NamedTuple):
    """A run in an archive: its files by name, and its last checkpoint."""

    run: Run
    files: dict[str, bytes]
    checkpoint: Checkpoint


def run_files(run: Run) -> dict[str, Path]:
    """The files of a run on this machine by their names in an archive.

    They are unpacked in this order and packed in the reverse one: latest.pth never comes before a file that belongs to
    it, and a log is at least as far as the checkpoint beside it.
    """
    best = {"best.pth": run.latest.with_name("best.pth")} if run.row.checkpoint == "best" else {}
    logs = {name: run.settings.log_path / name for name in ("settings.json", "tables.log", "train.log")}
    return {**best, **logs, "latest.pth": run.latest}


class Archive:
    """An archive of runs that is kept current while they train."""

    def __init__(self, path: Path, rows: list[Row], overrides: dict[str, Any]):
        """Of the runs of `rows` and those in the archive already.

        Raises DamagedFile as `read` does, and Mismatch where the archive is ahead of a run on this machine.
        """
        self.path = path
        self.times: dict[str, int] = {}  # of the checkpoints in the archive
        self.written = float("-inf")
        packed = read(path, overrides) if path.exists() else []
        for run, _, checkpoint in packed:
            here = run.load()
            if not here or here.step < checkpoint.step or _other_recipe(here, checkpoint):
                raise Mismatch(
                    f"{path} holds {run.name} at step {checkpoint.step}, which is not here: --take it first, or --pack "
                    "into another file"
                )
        self.runs = [find_run(row, overrides) for row in dict.fromkeys([*rows, *(run.row for run, _, _ in packed)])]

    def keep_current(self) -> None:
        """Write the archive if a checkpoint has changed, SECONDS after the last time at the earliest."""
        if time.monotonic() - self.written < SECONDS or self._checkpoint_times() == self.times:
            return
        try:
            self.write()
        except NotWritable as error:  # the trainings run on, and the next minute tries again
            log.warning(str(error))

    def write(self) -> None:
        """Write the archive, whole or not at all. Raises NotWritable on a full disk."""
        times, self.written = self._checkpoint_times(), time.monotonic()
        if not times:
            return
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for run in self.runs:
                for name, path in reversed(run_files(run).items()):
                    if run.name in times and path.is_file():
                        archive.writestr(f"{run.name}/{name}", path.read_bytes())
        write_bytes(self.path, buffer.getvalue())
        self.times = times

    def _checkpoint_times(self) -> dict[str, int]:
        return {run.name: run.latest.stat().st_mtime_ns for run in self.runs if run.latest.is_file()}


def take(path: Path, overrides: dict[str, Any]) -> None:
    """Unpack the runs of an archive that are ahead of those on this machine.

    Before anything is written, raises DamagedFile as `read` does, Occupied where a process trains one of the runs, and
    Mismatch where the run here has another recipe.
    """
    ahead = []
    with ExitStack() as locks:
        for packed in read(path, overrides):
            run, _, checkpoint = packed
            log_file = run.settings.log_path / "train.log"
            if log_file.is_file() and not lock(locks.enter_context(open(log_file, "ab"))):
                raise Occupied(f"run {run.name} is in training, by another process: stop it first")
            here = run.load()
            if here and here.step >= checkpoint.step:
                log.info(f"{run.name}: kept at step {here.step}; {path} has step {checkpoint.step}")
                continue
            if here and (name := _other_recipe(here, checkpoint)):
                raise Mismatch(f"{run.latest} and {run.name} in {path} differ in {name}: move one away")
            ahead.append(packed)
        for run, files, checkpoint in ahead:
            if "best.pth" not in files:  # one that is here belongs to the checkpoint that is replaced
                run.latest.with_name("best.pth").unlink(missing_ok=True)
            for name, place in run_files(run).items():
                if name in files:
                    write_bytes(place, files[name])
            log.info(f"{run.name}: step {checkpoint.step}, from {path}")


def _other_recipe(a: Checkpoint, b: Checkpoint) -> str | None:
    return first_difference(RECIPE_FIELDS, a.settings, b.settings)


def read(path: Path, overrides: dict[str, Any]) -> list[PackedRun]:
    """The runs in an archive. Raises DamagedFile where it holds anything but files of rows' runs."""
    runs: dict[Run, dict[str, bytes]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                run_name, _, name = member.filename.partition("/")
                row = parse_name(run_name)
                run = row and find_run(row, overrides)
                if not run or name not in run_files(run):
                    raise DamagedFile(f"{path} holds {member.filename!r}, which is not a file of a row's run")
                with archive.open(member) as file:
                    data = file.read(LARGEST + 1)  # the size that the archive claims may be wrong
                if len(data) > LARGEST:
                    raise DamagedFile(f"{path}: {member.filename} is larger than any file of a run")
                runs.setdefault(run, {})[name] = data
    except UserError:
        raise
    except Exception as error:  # zipfile raises whatever its readers meet
        raise DamagedFile(f"{path} is not an archive of runs, or is cut off ({type(error).__name__})") from None
    return [PackedRun(run, files, _load(run, files, path)) for run, files in runs.items()]


def _load(run: Run, files: dict[str, bytes], path: Path) -> Checkpoint:
    """The last checkpoint of a packed run. Raises DamagedFile where one of its checkpoints can't be resumed from."""
    loaded = {}
    for name in [name for name in files if name.endswith(".pth")]:
        data = files[name]
        try:
            parts = zipfile.ZipFile(io.BytesIO(data)).infolist()  # PyTorch's format, which compresses nothing
            too_large = sum(part.file_size for part in parts) > len(data)
            found = None if too_large else checkpoints.load(io.BytesIO(data))
        except (zipfile.BadZipFile, UserError, ValueError, TypeError):
            found = None
        if not (found and found.settings and found.optimizer and type(found.step) is int):
            raise DamagedFile(f"{path}: {run.name}/{name} is not a checkpoint that a training resumes from")
        if field := first_difference(NETWORK_FIELDS, run.settings, found.settings):
            raise DamagedFile(f"{path}: {run.name}/{name} is of another network: {field} differs")
        loaded[name] = found
    if "latest.pth" not in loaded:
        raise DamagedFile(f"{path} holds no checkpoint of {run.name}")
    return loaded["latest.pth"]

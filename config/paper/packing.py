"""Runs of rows in one zip file, so that a training that was cut off resumes on another machine."""

import io
import zipfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from base.console import log
from base.errors import DamagedFile, MissingFile, Occupied
from base.files import lock, write_bytes
from paper.rows import Run, find_run, parse_name
from runs import checkpoints

# Unpacked in this order and packed in the reverse one: a checkpoint has the files that belong to it, or later ones.
NAMES = ("settings.json", "tables.log", "train.log", "best.pth", "latest.pth")
LARGEST = 2**26  # bytes of a file, unpacked; all files of a run take less than 6 MB


def pack(path: Path, runs: Iterable[Run]) -> None:
    """Write an archive of the runs that have a checkpoint, whole or not at all. Raises NotWritable."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for run in runs:
            for name in reversed(NAMES):
                if run.file("latest.pth").is_file() and run.file(name).is_file():
                    archive.writestr(f"{run.name}/{name}", run.file(name).read_bytes())
    write_bytes(path, buffer.getvalue())


def take(path: Path, overrides: dict[str, Any]) -> list[Run]:
    """Unpack the runs of an archive that are ahead of those on this machine; returns all its runs.

    Before anything is written, raises DamagedFile as `read` does, Occupied where another process trains one of them,
    and Mismatch where a run on this machine has another recipe than its row.
    """
    packed = read(path, overrides)
    ahead = [run for run, (step, _) in packed.items() if run.step < step]
    with ExitStack() as locks:  # held until all is written
        for run in ahead:
            if run.file("train.log").is_file() and not lock(locks.enter_context(open(run.file("train.log"), "ab"))):
                raise Occupied(f"run {run.name} is in training, by another process: stop it first")
        for run, (step, files) in packed.items():
            log.info(f"{run.name}: {f'step {step}, from {path}' if run in ahead else f'kept at step {run.step}'}")
            for name in NAMES:
                if run in ahead and name in files:
                    write_bytes(run.file(name), files[name])
    return list(packed)


def read(path: Path, overrides: dict[str, Any]) -> dict[Run, tuple[int, dict[str, bytes]]]:
    """Step and files of each run in an archive. Raises MissingFile, or DamagedFile where it holds others, or code."""
    runs: dict[Run, dict[str, bytes]] = {}
    member = ""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                row_name, _, name = member.partition("/")
                row = parse_name(row_name)
                with archive.open(member) as file:
                    data = file.read(LARGEST + 1)  # the size that the archive claims may be wrong
                if not row or name not in NAMES or len(data) > LARGEST:
                    raise DamagedFile("not a file of a row's run")
                runs.setdefault(find_run(row, overrides), {})[name] = data
        return {
            run: (int(checkpoints.load(io.BytesIO(files["latest.pth"])).step), files) for run, files in runs.items()
        }
    except FileNotFoundError:
        raise MissingFile(f"{path} is missing") from None
    except Exception:  # zipfile and PyTorch raise whatever they meet
        raise DamagedFile(f"{path} is damaged, or holds more than files of rows' runs: see {member!r}") from None

"""The repository's folder, atomic writes and locks."""

import json
import os
from pathlib import Path
from typing import IO, Any

from base.errors import NotWritable

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parents[2]  # the repository


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all: under a temporary name beside `path`, synced, then renamed.

    Makes the folder if it is missing. Raises NotWritable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise NotWritable(f"{path} can't be written: {error.strerror}; nothing there was changed") from None


def write_json(path: Path, values: Any) -> None:
    """`write_bytes` of JSON, indented and with a newline at the end."""
    write_bytes(path, (json.dumps(values, indent=1) + "\n").encode())


def lock(file: IO) -> bool:
    """Lock an open file until it is closed; False if another process has locked it.

    Always True where there are no locks (Windows, some file systems).
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True

"""Where the repository is, files that are written whole or not at all, and locks."""

import json
import os
from pathlib import Path
from typing import IO, Any

from base.errors import NotWritable

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

ROOT = Path(__file__).resolve().parents[2]  # paths hang on the repository, not on the caller's working directory


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file under a temporary name beside `path`, sync it and rename it. Raises NotWritable on a full disk."""
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
    """Write JSON as `write_bytes` writes, indented, with a newline at its end."""
    write_bytes(path, (json.dumps(values, indent=1) + "\n").encode())


def lock(file: IO) -> bool:
    """Lock an open file until it is closed; False where another process holds it.

    Where there are no locks (Windows, some file systems) nothing is locked, and True is returned.
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

"""The repository's folder, atomic writes and locks."""

import errno
import json
import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from base.errors import BadName, NotWritable

ROOT = Path(__file__).resolve().parents[2]  # the repository
# Errors of one name: other files in the same place may be written.
OF_NAMES = {errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EINVAL, errno.EILSEQ}


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all, in a folder that is made if it is missing. Raises NotWritable.

    That is BadName if it is due to the name, so that others may be written.
    """
    temporary = path.with_name(f".{zlib.crc32(os.fsencode(path.name)):08x}.{os.getpid()}.tmp")  # short, as names may be
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        kind = BadName if error.errno in OF_NAMES else NotWritable
        raise kind(f"{path} can't be written: {error.strerror}; nothing there was changed") from None
    finally:
        with suppress(OSError):  # it is gone, unless an error or Ctrl-C came first
            temporary.unlink()


def write_json(path: Path, values: Any) -> None:
    """`write_bytes` of JSON, indented and with a newline at the end."""
    write_bytes(path, (json.dumps(values, indent=1) + "\n").encode())


def lock(file: IO) -> bool:
    """Lock an open file until it is closed; False if another process has locked it."""
    try:
        import fcntl

        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # no locks: Windows, some file systems
        pass
    return True

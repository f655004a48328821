"""Atomic writes and locks."""

import os
import resource
import subprocess
import sys

import pytest

from base.errors import NotWritable
from base.files import lock, write_bytes


def test_a_file_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    """Else a power cut could leave an empty file in place of the old one."""
    synced, renamed, replace = [], [], os.replace

    def rename(source, target):
        renamed.append((os.stat(source).st_ino, list(synced), target))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_ino))
    monkeypatch.setattr(os, "replace", rename)
    path = tmp_path / "new" / "file"
    write_bytes(path, b"data")
    (inode, synced_before, target) = renamed.pop()
    assert (synced_before, target) == ([inode], path)
    assert path.read_bytes() == b"data"


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(NotWritable):
            write_bytes(path, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_is_locked_until_it_is_closed(tmp_path):
    other = f"from base.files import lock; print(lock(open({str(tmp_path / 'file')!r}, 'a')))"

    def locked_elsewhere():
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", other], env=environment, capture_output=True, check=True)
        return done.stdout == b"False\n"

    with open(tmp_path / "file", "a") as file:
        assert lock(file)
        assert locked_elsewhere()
    assert not locked_elsewhere()

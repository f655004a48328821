"""Atomic writes and locks."""

import errno
import os
import resource
import subprocess
import sys

import pytest

from base.errors import BadName, NotWritable
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


def test_a_name_of_any_length_that_the_file_system_takes(tmp_path):
    write_bytes(tmp_path / ("y" * 255), b"data")
    assert (tmp_path / ("y" * 255)).read_bytes() == b"data"
    assert len(os.listdir(tmp_path)) == 1


def test_a_bad_name_is_told_from_a_place_that_can_not_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name in ("y" * 256, "folder", "file/a", f"{'z' * 256}/a"):
        with pytest.raises(BadName):
            write_bytes(tmp_path / name, b"data")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NotWritable) as caught:
        write_bytes(tmp_path / "new", b"data")
    assert not isinstance(caught.value, BadName)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_ctrl_c_leaves_no_temporary_file(tmp_path, monkeypatch):
    def stop(number):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "file", b"data")
    assert os.listdir(tmp_path) == []


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

"""Large tensors in memory or in files."""

import errno
import mmap
import os
from pathlib import Path

import pytest
import torch

from base.errors import UserError
from fast import memory
from fast.memory import GIB, Room


def test_tensors_are_in_memory_while_there_is_room(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 4000 / (1 - memory.SPARE) + 1)
    room = Room()
    first, second = room.zeros(10, 50), room.zeros(25, 20)
    assert not room.mapped
    third = room.zeros(3, 7)
    assert len(room.mapped) == 1
    for tensor in (first, second, third):
        assert tensor.dtype == torch.float32
        assert not tensor.any()
    third.copy_(torch.arange(21).view(3, 7))
    room.release()
    assert third.sum() == 210


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.bfloat16, 2), (torch.float32, 4), (torch.float64, 8)])
def test_other_samples_than_float32_in_memory_and_in_a_file(dtype, itemsize):
    room = Room()
    room.left = 10 * 20 * itemsize
    tensors = room.zeros(10, 20, dtype=dtype), room.zeros(7, 3, dtype=dtype)
    assert room.left == 0
    assert [len(mapped) for mapped in room.mapped] == [7 * 3 * itemsize]
    for tensor, shape in zip(tensors, [(10, 20), (7, 3)], strict=True):
        assert tensor.dtype == dtype
        assert tensor.shape == shape
        assert not tensor.any()
    tensors[1].copy_(torch.arange(21).view(7, 3))
    room.release()
    assert tensors[1].sum() == 210


def test_the_limit_is_the_whole_process_and_never_more_than_is_free(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 10 * GIB)
    monkeypatch.setattr(memory, "resident_memory", lambda: GIB)
    assert Room(4).left == 3 * GIB
    assert Room(100).left == Room().left == 10 * GIB * (1 - memory.SPARE)
    room = Room(4)
    room.reserve(3 * GIB)
    assert room.left == 0


def test_no_room_on_the_disk_is_a_message(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(memory.tempfile, "tempdir", None)
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match=rf"needs 4\.0 GiB more .* {tmp_path} .*No space left.*TMPDIR"):
        Room(1e-9).zeros(GIB)
    assert not list(tmp_path.iterdir())


def test_free_memory_heeds_the_control_group(monkeypatch):
    free = memory.free_memory()
    assert 0 < free < 1e15
    monkeypatch.setattr(memory, "_left_in_control_group", lambda: 1234)
    assert memory.free_memory() == 1234


def test_left_in_control_group(monkeypatch):
    files = {
        "/sys/fs/cgroup/memory.max": "1000\n",
        "/sys/fs/cgroup/memory.current": "700\n",
        "/sys/fs/cgroup/memory.stat": "anon 300\ninactive_file 150\n",
    }

    def read_text(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert memory._left_in_control_group() == 450
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert memory._left_in_control_group() == float("inf")


def test_resident_memory_grows_with_what_is_held():
    before = memory.resident_memory()
    with mmap.mmap(-1, 80 * 2**20) as held:
        held.write(bytes(len(held)))
        if before:  # Linux
            assert 70e6 < memory.resident_memory() - before < 200e6

"""Large tensors in memory or in files."""

import errno
import mmap
import os
from pathlib import Path

import pytest
import torch

from base.errors import OutOfMemory
from fast import memory
from fast.memory import GIB, MemoryBudget


def test_tensors_are_in_memory_within_the_budget(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 4000 / (1 - memory.SPARE) + 1)
    budget = MemoryBudget()
    first, second = budget.zeros(10, 50), budget.zeros(25, 20)
    assert not budget.mapped
    third = budget.zeros(3, 7)
    assert len(budget.mapped) == 1
    for tensor in (first, second, third):
        assert tensor.dtype == torch.float32
        assert not tensor.any()
    third.copy_(torch.arange(21).view(3, 7))
    budget.release()
    assert third.sum() == 210


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.bfloat16, 2), (torch.float32, 4), (torch.float64, 8)])
def test_other_samples_than_float32_in_memory_and_in_a_file(dtype, itemsize):
    budget = MemoryBudget()
    budget.left = 10 * 20 * itemsize
    tensors = budget.zeros(10, 20, dtype=dtype), budget.zeros(7, 3, dtype=dtype)
    assert budget.left == 0
    assert [len(mapped) for mapped in budget.mapped] == [7 * 3 * itemsize]
    for tensor, shape in zip(tensors, [(10, 20), (7, 3)], strict=True):
        assert tensor.dtype == dtype
        assert tensor.shape == shape
        assert not tensor.any()
    tensors[1].copy_(torch.arange(21).view(7, 3))
    budget.release()
    assert tensors[1].sum() == 210


def test_the_limit_is_the_whole_process_and_never_more_than_is_free(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 10 * GIB)
    monkeypatch.setattr(memory, "resident_memory", lambda: GIB)
    assert MemoryBudget(4).left == 3 * GIB
    assert MemoryBudget(100).left == MemoryBudget().left == 10 * GIB * (1 - memory.SPARE)


def test_a_full_disk_is_an_error_that_names_the_folder(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(memory.tempfile, "tempdir", None)
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OutOfMemory, match=str(tmp_path)):
        MemoryBudget(1e-9).zeros(GIB)
    assert not list(tmp_path.iterdir())


def test_free_memory_heeds_the_control_group(monkeypatch):
    free = memory.free_memory()
    assert 0 < free < 1e15
    monkeypatch.setattr(memory, "_free_in_control_group", lambda: 1234)
    assert memory.free_memory() == 1234


def test_free_in_control_group(monkeypatch):
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
    assert memory._free_in_control_group() == 450
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert memory._free_in_control_group() == float("inf")


def test_resident_memory_grows_with_what_is_held():
    before = memory.resident_memory()
    with mmap.mmap(-1, 80 * 2**20) as held:
        held.write(bytes(len(held)))
        if before:  # Linux
            assert 70e6 < memory.resident_memory() - before < 200e6

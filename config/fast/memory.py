"""Memory for large images: tensors that do not fit into the free memory lie in temporary files."""

import math
import mmap
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from base.console import log
from base.errors import OutOfMemory

GIB = 2**30
SPARE = 0.15  # share of the free memory that is left to other processes, and to what is not counted here
CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> float:
    """Bytes that this process may still allocate: what the system has free, or the process's control group."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: half of what the machine has
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    return min(free, _free_in_control_group())


def _free_in_control_group() -> float:
    """Bytes free in the process's control group (a container, a batch job); infinite without one."""
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # not Linux, version 1, or the limit is "max"
        return math.inf
    return limit - used + int(statistics["inactive_file"])  # pages of files are freed on demand


def resident_memory() -> int:
    """Bytes of memory that this process holds now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class MemoryBudget:
    """Allocates large tensors of zeros: in memory as long as the budget lasts, then in temporary files.

    `limit_gib` bounds the whole process; 0: what is free now.
    """

    def __init__(self, limit_gib: float = 0.0):
        free = free_memory() * (1 - SPARE)
        self.left = min(free, limit_gib * GIB - resident_memory()) if limit_gib else free  # bytes
        self.mapped: list[mmap.mmap] = []

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of zeros. Raises OutOfMemory if it fits neither into the memory nor onto the disk."""
        size = dtype.itemsize * math.prod(shape)
        if size <= max(self.left, 0):
            self.left -= size
            return torch.zeros(shape, dtype=dtype)
        folder = tempfile.gettempdir()
        if "TMPDIR" not in os.environ and sys.platform == "linux":
            folder = "/var/tmp"  # unlike /tmp never in memory itself
        log.debug(f"{size / GIB:.2f} GiB in a file in {folder}: {max(self.left, 0) / GIB:.2f} GiB of memory are free")
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.truncate(size)
                if hasattr(os, "posix_fallocate"):  # a file with holes would end the program when the disk is full
                    os.posix_fallocate(file.fileno(), 0, size)
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise OutOfMemory(
                f"out of memory: the image needs {size / GIB:.1f} GiB more than {folder} has free ({error.strerror}): "
                "set TMPDIR to another folder, or make the image smaller"
            ) from None
        self.mapped.append(mapped)
        return torch.frombuffer(mapped, dtype=dtype).view(shape)

    def release(self) -> None:
        """Let go of the pages of the files that lie in memory; their content stays in the files."""
        for mapped in self.mapped:
            mapped.madvise(mmap.MADV_DONTNEED)

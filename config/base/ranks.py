"""Ranks: the processes of torchrun, which share the work of one command. Without torchrun there is one, rank 0."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from base.errors import LostProcess

Item = TypeVar("Item")
LOST = ("onnection", "gloo", "roken pipe", "imed out", "NCCL", "ocket")  # in errors of a broken link
ENDED = "another process of this run has ended: see its messages for the reason"


@contextmanager
def joined() -> Iterator[None]:
    """Within this, the process is connected to the others of torchrun, if any. Raises LostProcess if one ends."""
    several = dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1
    if not several or dist.is_initialized():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
        total([0.0])  # waits for all; a barrier may use NCCL, which needs a GPU per rank even if all are on the CPU
    except RuntimeError as error:
        if is_lost(error):
            raise LostProcess(ENDED) from None
        raise
    dist.destroy_process_group()


def is_lost(error: RuntimeError) -> bool:
    """Whether this error means that another process has ended."""
    return count() > 1 and any(word in str(error) for word in LOST)


def count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if count() > 1 else 0


def local() -> tuple[int, int]:
    """This rank's number on its machine, and how many ranks there are on it."""
    return (int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])) if count() > 1 else (0, 1)


def is_first() -> bool:
    return rank() == 0


def part(total: int) -> range:
    """This rank's part of `total` consecutive things: all parts are equal, or longer by one."""
    return range(total * rank() // count(), total * (rank() + 1) // count())


def share(items: Sequence[Item]) -> Sequence[Item]:
    """This rank's items: every `count()`-th."""
    return items[rank() :: count()]


def gather(mine: list[Item]) -> list[Item]:
    """The results of all ranks for their `share` of some items, in the order of the items."""
    if count() == 1:
        return mine
    lists: list[list[Item]] = [[] for _ in range(count())]
    dist.all_gather_object(lists, mine)
    return [lists[i % count()][i // count()] for i in range(sum(map(len, lists)))]


def total(values: list[float]) -> list[float]:
    """Sums over all ranks."""
    if count() == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def average_gradients(module: nn.Module) -> None:
    """Replace a module's gradients with their mean over the ranks."""
    if count() > 1:
        for parameter in module.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= count()


def from_first(make: Callable[[], Item]) -> Item:
    """What `make` returns on rank 0, on every rank. If it raises an error there, the other ranks exit silently."""
    if count() == 1:
        return make()
    message: list[Any] = [None]
    try:
        if is_first():
            message = [(make(),)]
    finally:
        dist.broadcast_object_list(message)
    if message[0] is None:
        raise SystemExit(2)
    return message[0][0]

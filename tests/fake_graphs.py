"""CUDA graphs without a GPU: what PyTorch's graph API does, on the CPU, as strictly as the real one.

Operations are recorded as they run, and replayed on the same memory. What a CUDA graph can't hold is a RuntimeError, as
there: a value that is read from the device, and one of Python's that is copied to it.
"""

from contextlib import contextmanager, nullcontext
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FakeGraph:
    """In the place of `torch.cuda.CUDAGraph`."""

    made: ClassVar[list["FakeGraph"]] = []

    def __init__(self):
        self.operations: list[tuple] = []
        self.replays = 0
        self.started = False
        FakeGraph.made.append(self)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for function, arguments, keywords, outputs in self.operations:
            again = function(*arguments, **keywords)
            inputs = set(map(_memory, tree_leaves((arguments, keywords))))
            for output, new in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                if isinstance(output, Tensor) and _memory(output) not in inputs:
                    output.copy_(new)


def _memory(x: object) -> int | None:
    return x.untyped_storage().data_ptr() if isinstance(x, Tensor) else None


WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default)  # item(), torch.tensor(..)


def _refuse_waiting(function: object) -> None:
    if function in WAITS:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")


class _NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        _refuse_waiting(function)
        return function(*arguments, **(keywords or {}))


class _SyncDebugMode:
    """In the place of `torch.cuda.get_sync_debug_mode` and `set_sync_debug_mode`."""

    def __init__(self):
        self.now, self.refusing = 0, None

    def get(self) -> int:
        return self.now

    def set(self, mode: int | str) -> None:
        if self.refusing:
            self.refusing.__exit__(None, None, None)
        self.now = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)
        self.refusing = _NoWaiting() if self.now == 2 else None
        if self.refusing:
            self.refusing.__enter__()


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: FakeGraph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        _refuse_waiting(function)
        outputs = function(*arguments, **keywords)
        self.graph.operations.append((function, arguments, keywords, outputs))
        return outputs


class _Stream:
    def wait_stream(self, other: "_Stream") -> None:
        assert isinstance(other, _Stream)


@contextmanager
def _record(graph: FakeGraph, pool=None, stream=None, capture_error_mode="global"):
    # With "global", another thread that pins memory meanwhile would break the recording.
    assert isinstance(stream, _Stream)
    assert capture_error_mode == "thread_local"
    graph.started = True
    with _Recorder(graph):
        yield


def install(monkeypatch) -> type[FakeGraph]:
    """Put the fake in the place of PyTorch's; returns the class, whose `made` are the graphs so far."""
    FakeGraph.made, sync_debug_mode = [], _SyncDebugMode()
    for name, fake in {
        "CUDAGraph": FakeGraph,
        "graph": _record,
        "Stream": _Stream,
        "stream": lambda stream: nullcontext(),
        "current_stream": _Stream,
        "graph_pool_handle": lambda: (0, 1),
        "synchronize": lambda *_: None,
        "get_sync_debug_mode": sync_debug_mode.get,
        "set_sync_debug_mode": sync_debug_mode.set,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return FakeGraph

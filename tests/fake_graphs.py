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


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: FakeGraph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if function in WAITS:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
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
    with _Recorder(graph):
        yield


def install(monkeypatch) -> type[FakeGraph]:
    """Put the fake in the place of PyTorch's; returns the class, whose `made` are the graphs so far."""
    FakeGraph.made = []
    for name, fake in {
        "CUDAGraph": FakeGraph,
        "graph": _record,
        "Stream": _Stream,
        "stream": lambda stream: nullcontext(),
        "current_stream": _Stream,
        "synchronize": lambda *_: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return FakeGraph

"""CUDA graphs: a function's kernels, which Python would launch one by one, are recorded once and then replayed.

A graph repeats the same kernels on the same memory, so it needs inputs of one shape and weights that stay at their
addresses: an optimiser may change them, but they must not be replaced.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from base.console import log
from base.devices import autocast_dtype, empty_cache, is_out_of_memory

WARM_UP = 3  # calls before the recording, in which libraries load their kernels and code is compiled
SEEN_BEFORE = 2  # images of a shape that are computed without a graph; from the next on a graph pays
MAX_SHAPES = 8  # that graphs are kept for
MAX_PIXELS = 2**20  # of an image; a larger one keeps the GPU busy anyway, and its graph would keep much memory


class Replay:
    """`function` of CUDA tensors, recorded with inputs of the shapes of `examples`, and replayed by each call.

    The outputs, tensors in lists or dicts, are overwritten by the next call. After each call, `parameters` have the
    gradients that `function` computes. Raises RuntimeError if `function` cannot be recorded: it must not wait for the
    GPU or read from it. Replays with the same `pool` share the memory of intermediate results.
    """

    def __init__(
        self, function: Callable, examples: Sequence[Tensor], parameters: Sequence[Tensor] = (), pool: Any = None
    ):
        with torch.inference_mode(False):  # or they could only be replayed in inference mode
            self.inputs = [x.clone() for x in examples]
        self.parameters, self.graph = parameters, torch.cuda.CUDAGraph()
        kind, dtype = examples[0].device.type, autocast_dtype(examples[0])
        # 16-bit copies of weights are made at each use: those in autocast's cache end with it.
        uncached = torch.autocast(kind, dtype, enabled=dtype is not None, cache_enabled=False)
        with torch.cuda.device_of(examples[0]), uncached:
            self._record(function, pool)
        self.gradients = [parameter.grad for parameter in parameters]

    def _record(self, function: Callable[..., Any], pool: tuple | None) -> None:
        side = _side_stream(self.inputs[0].device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP - 1):
                function(*self.inputs)
            with _no_waiting():
                function(*self.inputs)
            # Other threads, which load the next crops, may use CUDA meanwhile.
            with torch.cuda.graph(self.graph, pool, side, capture_error_mode="thread_local"):
                self.outputs = function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)

    def __call__(self, *inputs: Tensor) -> Any:
        for recorded, given in zip(self.inputs, inputs, strict=True):
            recorded.copy_(given)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.outputs


@cache
def _side_stream(device: torch.device) -> "torch.cuda.Stream":
    """The stream of all recordings on a device: libraries and memory pools keep memory for each stream."""
    return torch.cuda.Stream()


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Within this, an operation that waits for the GPU, and so cannot be recorded, is a RuntimeError.

    No recording may fail: up to 2.12, PyTorch then never frees cached memory again.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode may miss some operations
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class Replays:
    """`function` of an image and the number of stages, with graphs for frequent shapes; the caller owns the outputs."""

    def __init__(self, function: Callable[[Tensor, int], list[Tensor]]):
        self.function = function
        self.seen: Counter = Counter()
        self.max_shapes, self.pool = MAX_SHAPES, None
        self.graphs: dict[tuple, Replay | None] = {}  # None: this shape cannot be recorded

    def __call__(self, image: Tensor, stage_num: int) -> list[Tensor]:
        key = (image.shape, stage_num, autocast_dtype(image))
        self.seen[key] += 1
        small = image.shape[0] * image.shape[-2] * image.shape[-1] <= MAX_PIXELS
        if small and self.seen[key] > SEEN_BEFORE and key not in self.graphs and len(self.graphs) < self.max_shapes:
            self.pool = self.pool or torch.cuda.graph_pool_handle()  # one for all, as outputs are copied
            self.graphs[key] = record(lambda x: self.function(x, stage_num), [image], pool=self.pool)
        if replay := self.graphs.get(key):
            return [output.clone() for output in replay(image)]
        try:
            return self.function(image, stage_num)
        except RuntimeError as error:
            if not self.graphs or not is_out_of_memory(error):
                raise
        self.max_shapes = 0  # a graph keeps its memory as long as it lives: no more graphs from here on
        self.graphs.clear()
        empty_cache(image.device)
        return self.function(image, stage_num)


def record(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Replay | None:
    """A `Replay`, or None, with a line in the log, if `function` cannot be recorded."""
    try:
        return Replay(function, *arguments, **keywords)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
    torch.cuda.synchronize()
    log.warning(f"no CUDA graph, kernels are launched one by one: {reason}")
    return None


@contextmanager
def replaying(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Within this, on a CUDA GPU, `network.at_once` replays graphs; the weights must stay at their addresses."""
    if device.type != "cuda" or not network.cuda_graphs:
        yield
        return
    network.at_once = Replays(network)
    try:
        yield
    finally:
        del network.at_once

"""CUDA graphs: a function's kernels are recorded once and then replayed, which takes no time to launch them.

A small network on a fast GPU waits for Python, which launches some hundred kernels one by one; a graph launches all at
once. It repeats the same kernels on the same memory, so it is for inputs of one shape, and for weights that stay in
their place: an optimiser may change them, but they must not be replaced.
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

WARM_UP = 3  # calls before the recording, in which libraries load their kernels and code is compiled; see _no_waiting
SEEN_BEFORE = 2  # images of a shape that go their usual way; from the next on a graph pays
MOST_SHAPES = 8  # that graphs are kept for
MOST_PIXELS = 2**20  # of an image; a larger one keeps the GPU busy anyhow, and its graph would keep much memory


class Replay:
    """`function` of CUDA tensors, recorded with inputs of the shapes of `examples`, and replayed by each call.

    The outputs, tensors in lists or dicts, are overwritten by the next call. Gradients that `function` writes to
    `parameters`, from None, are theirs after each call. Raises RuntimeError where `function` can't be recorded: it must
    not wait for the GPU, nor read from it. Replays with the same `pool` use the same memory in between.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        examples: Sequence[Tensor],
        parameters: Sequence[nn.Parameter] = (),
        pool: tuple | None = None,
    ):
        with torch.inference_mode(False):  # else they could be replayed in inference mode alone
            self.inputs = [x.clone() for x in examples]
        self.parameters = parameters
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device_of(examples[0]), _without_autocast_cache():
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
            # Other threads, which fetch the next crops, may go on meanwhile.
            with torch.cuda.graph(self.graph, pool, side, capture_error_mode="thread_local"):
                self.outputs = function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)

    def __call__(self, *inputs: Tensor) -> Any:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.outputs


@cache
def _side_stream(device: torch.device) -> "torch.cuda.Stream":
    """The stream of all recordings on a device: libraries keep memory for each stream, and pools go by it."""
    return torch.cuda.Stream()


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Within this, what waits for the GPU, and so can't be recorded, is a RuntimeError.

    It must not come to a recording that fails: up to 2.12, PyTorch takes that for still going on, and then never again
    gives up cached memory where it is short of it, nor does `torch.cuda.empty_cache`.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it may overlook something
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Within this, 16-bit copies of weights are made where they are used: those in autocast's cache end with it."""
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class Replays:
    """`function` of an image and the number of stages, through a graph for each shape that comes often enough.

    The outputs, lists of tensors, are copies, and the caller's.
    """

    def __init__(self, function: Callable[[Tensor, int], list[Tensor]]):
        self.function = function
        self.seen: Counter = Counter()
        self.most, self.pool = MOST_SHAPES, None
        self.graphs: dict[tuple, Replay | None] = {}  # None: of a shape that can't be recorded

    def __call__(self, image: Tensor, stage_num: int) -> list[Tensor]:
        key = (image.shape, stage_num, autocast_dtype(image))
        self.seen[key] += 1
        small = image.shape[0] * image.shape[-2] * image.shape[-1] <= MOST_PIXELS
        if small and self.seen[key] > SEEN_BEFORE and key not in self.graphs and len(self.graphs) < self.most:
            self.pool = self.pool or torch.cuda.graph_pool_handle()  # one for all: outputs are copied at once
            self.graphs[key] = record(lambda x: self.function(x, stage_num), [image], pool=self.pool)
        replay = self.graphs.get(key)
        if replay is not None:
            return [output.clone() for output in replay(image)]
        try:
            return self.function(image, stage_num)
        except RuntimeError as error:
            if not self.graphs or not is_out_of_memory(error):
                raise
        self.most = 0  # a graph keeps its memory as long as it lives: from here on there are none
        self.graphs.clear()
        empty_cache(image.device)
        return self.function(image, stage_num)


def record(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Replay | None:
    """A `Replay`; None, with a line, where `function` can't be recorded, and then it has to be called as it is."""
    try:
        return Replay(function, *arguments, **keywords)
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    torch.cuda.synchronize()
    log.warning(f"kernels are launched one by one, as they can't be recorded as a CUDA graph: {reason}")
    return None


@contextmanager
def replaying(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Within this, on a CUDA GPU, images of one shape go through `network.at_once` by replaying.

    Only within this, as the network's weights must stay in their place.
    """
    if device.type != "cuda" or not network.cuda_graphs:
        yield
        return
    network.at_once = Replays(network)
    try:
        yield
    finally:
        del network.at_once

"""Batches of training crops, prepared by a thread or by worker processes while the network computes."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing import resource_tracker
from threading import Thread

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from base import ranks

STOPS = (signal.SIGINT, signal.SIGTERM)  # signals that ask a training to end


def training_batches(dataset: Dataset, first_step: int, device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """This rank's part of each batch of a `CropDataset`, from `first_step` to the last step.

    A batch is (O, B), each (N, 3, patch, patch) uint8, then the labels (N, patch, patch) int64, if any.
    """
    settings = dataset.settings
    mine = ranks.part(settings.batch_size)
    starts = range(first_step * settings.batch_size, settings.steps * settings.batch_size, settings.batch_size)
    workers = settings.num_workers
    if workers < 0:  # threads do not speed up synthetic rain, and a GPU's step takes less time than its rain
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)  # one rank's, less one for its step
        workers = min(8, cores) if device.type == "cuda" and settings.rain else 0
    loader = DataLoader(
        dataset,
        batch_sampler=[range(start + mine.start, start + mine.stop) for start in starts],
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else the loader would draw from the global generator
        worker_init_fn=_init_worker,
    )
    return _from_workers(loader) if workers else _one_ahead(iter(loader))


def _from_workers(loader: DataLoader) -> Iterator:
    """The loader's batches. Its workers end with this iterator, or with the program if the iterator outlives it."""
    others, workers = multiprocessing.active_children(), []
    with ExitStack() as ending:
        # At exit Python sends SIGTERM to its child processes, which ignore it, and waits: they must be gone by then.
        atexit.register(ending.close)
        ending.callback(atexit.unregister, ending.close)
        ending.callback(lambda: [process.kill() for process in workers])
        if multiprocessing.get_start_method() != "fork":
            resource_tracker.ensure_running()  # now, because starting it unblocks signals
        # Workers start with STOPS blocked: they import for seconds before `_init_worker`.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            batches = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            workers += [process for process in multiprocessing.active_children() if process not in others]
        ending.callback(batches._shutdown_workers)
        yield from batches


def _init_worker(_: int) -> None:
    """Ignore STOPS, which a terminal sends to the whole process group, and end with the parent."""
    for stop in STOPS:
        signal.signal(stop, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Needed with a fork server: PyTorch watches the process that forked the worker, which is then the server."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _one_ahead(batches: Iterator) -> Iterator:
    """The same batches; a thread prepares the next one while the caller computes."""
    with ThreadPoolExecutor(1, "crops") as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch

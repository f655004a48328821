"""Batches of crops: the same from a thread, from workers and in ranks; and how workers end."""

import multiprocessing
import signal
import time
from multiprocessing.process import BaseProcess

import pytest
import torch

from base import ranks
from base.errors import MissingFile
from dataset import CropDataset
from datasets import loader
from datasets.loader import training_batches
from test_dataset import batches, dataset, same


@pytest.mark.parametrize("aug_data", ["none", "rotate", "quarter_turns", "scale"])
@pytest.mark.parametrize("style", ["", "rain100h"])
def test_batches_do_not_depend_on_the_workers(data_dir, aug_data, style):
    values = {"aug_data": aug_data, "rain": style}
    assert same(batches(data_dir, **values), batches(data_dir, **values, num_workers=2))


@pytest.mark.parametrize("style", ["", "rain100h"])
@pytest.mark.parametrize(("batch_size", "counts"), [(4, (2, 2)), (5, (2, 3)), (5, (1, 2, 2)), (3, (1, 1, 1))])
def test_the_ranks_parts_are_the_whole_batch(data_dir, monkeypatch, style, batch_size, counts):
    whole = batches(data_dir, first_step=2, rain=style, batch_size=batch_size)
    monkeypatch.setattr(ranks, "count", lambda: len(counts))
    parts = []
    for rank, count in enumerate(counts):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        parts.append(batches(data_dir, first_step=2, rain=style, batch_size=batch_size))
        assert [len(O) for O, _ in parts[-1]] == [count] * 4
    together = [[torch.cat(crops) for crops in zip(*step, strict=True)] for step in zip(*parts, strict=True)]
    assert same(together, whole)


@pytest.mark.parametrize(
    ("num_workers", "device", "style", "local_ranks", "workers"),
    [
        (-1, "cpu", "rain100h", 1, 0),
        (-1, "cuda", "", 1, 0),
        (-1, "cuda", "rain100h", 1, 5),  # of six cores, one is the step's
        (-1, "cuda", "rain100h", 2, 2),
        (-1, "cuda", "rain100h", 6, 1),
        (3, "cpu", "", 1, 3),
        (0, "cuda", "rain100h", 1, 0),
    ],
)
def test_processes_that_make_crops(data_dir, monkeypatch, num_workers, device, style, local_ranks, workers):
    """By default there are none, except where a GPU would wait for synthetic rain."""
    requested = []
    monkeypatch.setattr(loader, "DataLoader", lambda *_, num_workers, **__: requested.append(num_workers) or [])
    monkeypatch.setattr(loader.os, "sched_getaffinity", lambda _: range(6), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    training_batches(dataset(data_dir, num_workers=num_workers, rain=style), 0, torch.device(device))
    assert requested == [workers]


def test_workers_end_with_their_batches(data_dir):
    """Also where batches are made that nobody takes; signals that were blocked while they started are not any more."""
    others, blocked = multiprocessing.active_children(), blocked_signals()
    coming = training_batches(dataset(data_dir, num_workers=2, steps=100), 0, torch.device("cpu"))
    next(coming)
    assert len(multiprocessing.active_children()) == len(others) + 2
    assert blocked_signals() == blocked
    coming.close()
    assert multiprocessing.active_children() == others


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of PyTorch's half-made loader
def test_workers_end_where_one_of_them_cannot_start(data_dir, monkeypatch):
    def start(process):
        if len(multiprocessing.active_children()) > len(others):
            raise BlockingIOError
        begin(process)

    others, blocked, begin = multiprocessing.active_children(), blocked_signals(), BaseProcess.start
    monkeypatch.setattr(BaseProcess, "start", start)
    with pytest.raises(BlockingIOError):
        next(training_batches(dataset(data_dir, num_workers=2), 0, torch.device("cpu")))
    for process in multiprocessing.active_children():
        process.join(10)
    assert multiprocessing.active_children() == others
    assert blocked_signals() == blocked


def blocked_signals():
    return signal.pthread_sigmask(signal.SIG_BLOCK, []) if hasattr(signal, "pthread_sigmask") else set()


@pytest.mark.parametrize("style", ["", "rain100h"])
def test_resumed_run_sees_what_the_unbroken_one_sees(data_dir, style):
    assert same(batches(data_dir, rain=style)[4:], batches(data_dir, first_step=4, rain=style))


def test_the_next_batch_is_made_during_a_step(data_dir, monkeypatch):
    """With no workers, the thread is one batch ahead, and no more."""
    read = []
    cut = CropDataset.__getitem__
    monkeypatch.setattr(CropDataset, "__getitem__", lambda self, sample: read.append(sample) or cut(self, sample))
    coming = training_batches(dataset(data_dir), 0, torch.device("cpu"))
    next(coming)
    end = time.monotonic() + 30
    while len(read) < 8 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.05)
    assert read == list(range(8))
    assert len(list(coming)) == 5
    assert read == list(range(24))


def test_file_that_vanishes_raises_its_error_from_the_thread(data_dir):
    crops = dataset(data_dir, cache_gib=0.0, steps=100)
    coming = training_batches(crops, 0, torch.device("cpu"))
    next(coming)
    for path in crops.paths:
        path.unlink()
    with pytest.raises(MissingFile):
        list(coming)

"""Ctrl-C, SIGTERM and SIGKILL: the step is finished, the checkpoint saved, no process is left."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import cv2
import numpy as np
import pytest

from base.errors import Occupied
from base.files import ROOT
from commands import LONG, SMALL, call, read, same_state
from conftest import make_pair

pytestmark = pytest.mark.slow  # processes, whose imports take seconds


def start_long_run(places, *words):
    words = ["-a", "train", *SMALL, *places, "--steps", 100000, "--log_steps", 1, "--save_steps", 20, *words]
    command = [sys.executable, str(ROOT / "config" / "main.py"), *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(folder, pattern, seconds=120):
    end = time.monotonic() + seconds
    while not any(folder.glob(pattern)):
        assert time.monotonic() < end, f"{folder / pattern} was not written"
        time.sleep(0.05)


WITH_WORKERS = """
import multiprocessing, os, pathlib, sys, time
if __name__ == "__mp_main__":  # a worker, or the fork server, that still imports
    pathlib.Path({folder!r}, f"importing_{{os.getpid()}}").touch()
    time.sleep(0.5)
sys.path.insert(0, {config!r})
import main
from base import console
if __name__ == "__main__":
    {first}
    multiprocessing.set_start_method({method!r})
    console.run_script(main.main)
"""


SLOW_SAVE = """
import sys, time
sys.path.insert(0, {config!r})
import main
from base import console
from runs import training
{hang}
console.run_script(main.main)
"""


@contextmanager
def training_with_workers(places, folder, method, *words, first=""):
    """A long run, leader of a process group, with two worker processes that are started by `method`.

    `first` is Python code that runs before it.
    """
    path = folder / "training.py"
    path.write_text(WITH_WORKERS.format(folder=str(folder), config=str(ROOT / "config"), method=method, first=first))
    words = [*SMALL, *places, "--num_workers", 2, "--steps", 10**5, "--save_steps", 20, "--val_images", 1, *words]
    command = [sys.executable, str(path), "-a", "train", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


def rest_of_output(process):
    """What a group prints on stdout and stderr. These end with the last of its processes: a left-over one times out."""
    return process.communicate(timeout=120)


needs_groups = pytest.mark.skipif(not hasattr(os, "killpg"), reason="process groups are POSIX's")


@needs_groups
@pytest.mark.parametrize(
    ("method", "name"),
    [("fork", signal.SIGTERM), ("fork", signal.SIGINT), ("spawn", signal.SIGTERM), ("forkserver", signal.SIGTERM)],
)
def test_interrupt_of_the_process_group_saves_with_workers(places, tmp_path, method, name):
    """Sent twice, as `timeout` does, and to a worker that still imports."""
    with training_with_workers(places, tmp_path, method) as process:
        if method != "fork":
            wait_for(tmp_path, "importing_*")
            for path in tmp_path.glob("importing_*"):
                os.kill(int(path.stem.split("_")[1]), name)
        wait_for(tmp_path / "model_dir", "sdsen/latest.pth")
        for _ in range(2):
            os.killpg(process.pid, name)
        output, errors = rest_of_output(process)
    assert process.returncode == 0, output + errors
    assert "Traceback" not in errors
    step = read(tmp_path, "latest").step
    call("-a", "train", *places, "--num_workers", 0, "--steps", step + 1)
    assert read(tmp_path, "latest").step == step + 1


@needs_groups
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_end_with_a_killed_training(places, tmp_path, method):
    with training_with_workers(places, tmp_path, method) as process:
        wait_for(tmp_path / "model_dir", "sdsen/latest.pth")
        process.kill()
        rest_of_output(process)


@needs_groups
@pytest.mark.parametrize(
    ("words", "first", "status"), [(["--lr", 1e30, "--milestones"], "", 2), ([], "main.train_step = None", 1)]
)
def test_workers_do_not_keep_a_training_from_ending_by_an_error(places, tmp_path, words, first, status):
    """Neither by one that the user sees, nor by another, whose traceback holds on to the batches."""
    with training_with_workers(places, tmp_path, "fork", *words, first=first) as process:
        _, errors = rest_of_output(process)
    assert process.returncode == status, errors


@pytest.mark.parametrize("name", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_finishes_the_step_and_saves(places, tmp_path, name):
    """The checkpoint is that of the last step in the log."""
    process = start_long_run(places)
    wait_for(tmp_path / "model_dir", "sdsen/latest.pth")
    process.send_signal(name)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    logged = re.findall(r"^step (\d+)/100000 ", output, re.MULTILINE)
    assert read(tmp_path, "latest").step == int(logged[-1])


def test_a_run_is_trained_by_one_process_at_a_time(places, tmp_path):
    process = start_long_run(places)
    try:
        wait_for(tmp_path / "model_dir", "sdsen/latest.pth")
        with pytest.raises(Occupied):
            call("-a", "train", *places)
        call("-a", "train", *SMALL, *LONG, *places, "--steps", 1, "--run", "other")
    finally:
        process.kill()
        process.communicate()
    step = read(tmp_path, "latest").step
    call("-a", "train", *places, "--steps", step + 1)
    assert read(tmp_path, "latest").step == step + 1


def test_a_kill_leaves_the_last_checkpoint_and_the_steps_go_on_from_it(places, tmp_path):
    process = start_long_run(places, "--save_minutes", 0)  # writes a checkpoint in every step
    wait_for(tmp_path / "model_dir", "sdsen/step_20.pth")
    process.kill()
    process.communicate()
    step = read(tmp_path, "latest").step
    assert step >= 20
    call("-a", "train", *places, "--steps", step + 3)
    log = (tmp_path / "log_dir" / "sdsen" / "train.log").read_text()
    steps = [int(word) for word in re.findall(r" step (\d+)/", log)]
    assert steps[-3:] == [step + 1, step + 2, step + 3]
    call("-a", "train", *SMALL, *places, "--run", "unbroken", "--steps", step + 3, "--save_steps", 1000)
    assert same_state(read(tmp_path, "latest"), read(tmp_path, "latest", "unbroken"))


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_in_a_validation_answers_at_once(places, tmp_path, times):
    """The image takes minutes. Once: saved and owed. Once more, seconds later, in the save that hangs: the end."""
    pair = np.hstack(make_pair(1500, 1500))
    cv2.imwrite(str(tmp_path / "data" / "val" / "0.png"), pair)
    script = tmp_path / "training.py"
    hang = "training.Training.save = lambda *_: time.sleep(600)" if times == 2 else ""
    script.write_text(SLOW_SAVE.format(config=str(ROOT / "config"), hang=hang))
    words = [*SMALL[:-4], "--stage_num", 8, "--device", "cpu", *places, "--steps", 9, "--log_steps", 1]
    words += ["--save_steps", 1, "--memory_gib", 0.3]
    command = [sys.executable, str(script), "-a", "train", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while not process.stdout.readline().startswith("step 1/"):
            pass
        time.sleep(2)
        started = time.monotonic()
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(3)
        output, _ = process.communicate(timeout=60)
    assert time.monotonic() - started < 30
    assert process.returncode == (0 if times == 1 else 130), output
    assert [path.name for path in (tmp_path / "model_dir").rglob("*.pth")] == (["latest.pth"] if times == 1 else [])

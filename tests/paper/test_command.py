"""Rows that are trained and tested: in this process where that will do, in their own where they are stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import main
from base.errors import BadArgument, Mismatch, MissingFile, NotWritable, UserError
from base.files import ROOT
from paper import command, packing, rows, tables
from paper.rows import Row, find_run
from runs import checkpoints
from settings import read_overrides

SMALL = ["--batch_size", "2", "--patch_size", "16"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Results go to a temporary folder, and the recipe `tiny` is known."""
    monkeypatch.setattr(tables, "FOLDER", tmp_path / "results")
    tiny = {"steps": 4, "batch_size": 2, "patch_size": 16, "milestones": (3,), "lr": 1e-3}
    monkeypatch.setitem(rows.RECIPES, "tiny", tiny)
    return tmp_path / "results"


@pytest.fixture
def places(tmp_path, data_dir):
    folders = {"model_dir": tmp_path / "models", "log_dir": tmp_path / "log", "data_dir": data_dir}
    return [*(word for name, folder in folders.items() for word in (f"--{name}", str(folder))), "--device", "cpu"]


class InThisProcess:
    """Stands for subprocess.Popen: main.py runs here and has ended at once."""

    def __init__(self, command, stdout, **_):
        try:
            self.returncode = main.main(command[2:])
        except UserError as error:
            stdout.write(f"error: {error}\n")
            self.returncode = 2

    def poll(self):
        return self.returncode


@pytest.fixture
def in_process(folder, monkeypatch):
    monkeypatch.setattr(command, "subprocess", SimpleNamespace(Popen=InThisProcess))
    monkeypatch.setattr(command, "POLL", 0)


def call(*words):
    return main.main(["-a", "tables", *map(str, words)])


def test_a_row_is_trained_tested_and_written_once(in_process, folder, places, tmp_path):
    assert call("--run", "cnn_rain800_tiny", *places) == 0
    path = folder / "cnn_rain800_tiny.json"
    result = json.loads(path.read_text())
    best = checkpoints.load(tmp_path / "models" / "cnn_rain800_tiny" / "best.pth")
    assert (result["steps"], result["preset"], result["recipe"], result["test_images"]) == (4, "cnn", "tiny", 2)
    assert list(result["test"]) == ["input", "stage_1"]
    assert result["validation"][0][1] == pytest.approx(best.best_psnr, abs=0.005)
    time_of_writing = path.stat().st_mtime_ns
    assert call("--run", "cnn_rain800_tiny", *places) == 0
    assert path.stat().st_mtime_ns == time_of_writing
    assert call("--run", "cnn_rain800_tiny", "--steps", 5, *places) == 0  # a step is missing
    assert json.loads(path.read_text())["steps"] == 5


def test_with_the_papers_recipe_the_last_step_is_tested(in_process, folder, places, tmp_path):
    assert call("--run", "cnn_rain800", *places, *SMALL, "--steps", 2) == 0
    assert json.loads((folder / "cnn_rain800.json").read_text())["tested"] == "latest"
    assert [path.name for path in (tmp_path / "log" / "cnn_rain800").glob("*.csv")] == ["test_latest.csv"]


def test_a_row_is_done_with_all_steps_of_the_right_checkpoint(folder):
    run = find_run(Row("cnn", "rain800"), {})
    assert not command.is_done(run)
    for result, done in (
        ({"steps": 20000, "tested": "latest"}, True),
        ({"steps": 19999, "tested": "latest"}, False),
        ({"steps": 20000, "tested": "best"}, False),
    ):
        tables.write_result(run.name, result)
        assert command.is_done(run) == done


def test_a_failed_training_does_not_stop_the_others(in_process, folder, places, tmp_path, data_dir):
    """One row has the weights of another network."""
    wrong = find_run(Row("cnn", "rain800", "tiny"), {"model_dir": str(tmp_path / "models"), "data_dir": str(data_dir)})
    checkpoints.save(
        tmp_path / "models" / "dsen_rain800_tiny" / "latest.pth", checkpoints.Checkpoint({}, 1, wrong.settings)
    )
    assert call("--run", "dsen_rain800_tiny", "cnn_rain800_tiny", *places) == 1
    assert [path.stem for path in folder.iterdir()] == ["cnn_rain800_tiny"]
    assert (tmp_path / "log" / "dsen_rain800_tiny" / "tables.log").read_text().startswith("error: ")


def save_checkpoint(name, step, places):
    """The checkpoint of a row's run, with the settings of SMALL."""
    run = find_run(rows.find_row(name), read_overrides([*places, *SMALL]))
    checkpoints.save(
        run.file("latest.pth"), checkpoints.Checkpoint({}, step, run.settings, optimizer={"param_groups": []})
    )
    return run


def test_a_run_of_another_recipe_is_not_resumed(in_process, places):
    save_checkpoint("cnn_rain800", 1, places)
    with pytest.raises(Mismatch, match="patch_size"):
        call("--run", "cnn_rain800", *places)


def test_rows_are_listed_with_their_state(folder, places, capsys):
    run = save_checkpoint("cnn_rain800", 7, places)
    tables.write_result("dsen_rain800_tiny", {"steps": 4, "test": {"stage_1": {"psnr": 23.456, "ssim": 0.71234}}})
    call(*places, *SMALL)
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["dsen_rain100h"][1:4] == ["23.60", "/", "0.7618"]
    assert {"7", str(run.settings.steps)} <= set(lines["cnn_rain800"])
    assert {"23.46", "0.7123", "4"} <= set(lines["dsen_rain800_tiny"])
    assert set(lines) >= {row.name for row in rows.all_rows()}


def test_all_runs_are_packed_without_naming_them(folder, places, tmp_path):
    archive = tmp_path / "runs.zip"
    with pytest.raises(MissingFile):
        call("--pack", archive, *places)
    save_checkpoint("cnn_rain800", 7, places)
    assert call("--pack", archive, *places, *SMALL) == 0
    assert packed_steps(archive) == {"cnn_rain800": 7}


def test_a_run_that_is_further_in_the_archive_is_taken_before_that_is_replaced(folder, places, tmp_path):
    archive, elsewhere = tmp_path / "runs.zip", tmp_path / "elsewhere"
    for name, step in (("cnn_rain800", 7), ("dsen_rain800", 5)):
        save_checkpoint(name, step, places)
    assert call("--pack", archive, *places, *SMALL) == 0
    there = [*places, "--model_dir", str(elsewhere), "--log_dir", str(elsewhere)]
    for name, step in (("cnn_rain800", 4), ("mcnn_rain800", 3)):
        save_checkpoint(name, step, there)
    assert call("--pack", archive, *there, *SMALL) == 0
    assert packed_steps(archive) == {"cnn_rain800": 7, "dsen_rain800": 5, "mcnn_rain800": 3}


@pytest.mark.parametrize(
    "words",
    [
        ["--run", "nothing"],
        ["--jobs", "0"],
        ["--run", "cnn_rain800", "--stage_num", "3"],
        ["--run", "cnn_rain800", "--seed", "3"],
        ["--stepz", "3"],
    ],
)
def test_wrong_calls(folder, words):
    with pytest.raises(BadArgument if words != ["--stepz", "3"] else UserError):
        call(*words)


def test_help_is_that_of_the_tables(capsys):
    with pytest.raises(SystemExit) as ended:
        call("--help")
    assert not ended.value.code
    assert {"--run", "--jobs", "--minutes", "--pack", "--take", "--write"} <= set(capsys.readouterr().out.split())


class UntilTerminated:
    """Stands for subprocess.Popen: a training that runs until it is terminated."""

    def __init__(self):
        self.returncode = None

    def poll(self):
        return self.returncode

    def terminate(self):
        self.returncode = 0


@pytest.fixture
def processes(folder, monkeypatch):
    """The trainings that were started, which run until they are terminated."""
    started = []

    def start(*_, env, **__):
        started.append(UntilTerminated())
        started[-1].threads = int(env["OMP_NUM_THREADS"])
        return started[-1]

    monkeypatch.setattr(command, "subprocess", SimpleNamespace(Popen=start))
    monkeypatch.setattr(command, "POLL", 0.01)
    return started


def test_after_some_minutes_the_trainings_are_stopped(folder, places, processes, monkeypatch):
    """Two of them, which share the cores."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    started = time.monotonic()
    names = ["cnn_rain800_tiny", "dsen_rain800_tiny", "mcnn_rain800_tiny"]
    assert call("--run", *names, "--jobs", 2, "--minutes", 0.2 / 60, *places) == 1
    assert time.monotonic() - started >= 0.2
    assert [(process.returncode, process.threads) for process in processes] == [(0, 4), (0, 4)]
    assert not folder.exists()


@pytest.mark.parametrize("seconds", [60, 0.05])
def test_an_archive_is_kept_current_but_not_all_the_time_and_a_full_disk_stops_no_training(
    processes, places, tmp_path, monkeypatch, seconds
):
    calls = []

    def pack(path, runs):
        calls.append([run.name for run in runs])
        if len(calls) == 1:
            raise NotWritable("the disk is full")

    monkeypatch.setattr(command, "pack", pack)
    monkeypatch.setattr(command, "PACK_SECONDS", seconds)
    archive = tmp_path / "runs.zip"
    assert call("--run", "cnn_rain800_tiny", "--pack", archive, "--minutes", 0.3 / 60, *places) == 1
    assert [process.returncode for process in processes] == [0]
    assert set(map(tuple, calls)) == {("cnn_rain800_tiny",)}
    assert len(calls) == 2 if seconds == 60 else 3 <= len(calls) <= 9  # the first, and the last at the end


# ---------------------------------------------------------------- processes


def start(places, tmp_path, *words):
    """Two rows at once, in a process whose results go to tmp_path/results and whose archive is always current."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import main; "
        "from paper import command, tables; from base.console import run_script; "
        "tables.FOLDER = Path(sys.argv[2]); command.PACK_SECONDS = 0; "
        "sys.argv[1:] = sys.argv[3:]; run_script(main.main)"
    )
    words = ["-a", "tables", "--run", "cnn_rain800", "dsen_rain800", "--jobs", "2", *SMALL, *places, *map(str, words)]
    command = [sys.executable, "-c", code, str(ROOT / "config"), str(tmp_path / "results"), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


@pytest.fixture
def one_thread(monkeypatch):
    """Here and in processes that are started: another number of threads rounds differently."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def packed_steps(archive):
    read = packing.read(archive, {}) if archive.is_file() else {}
    return {run.name: step for run, (step, _) in read.items()}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_rows_that_were_stopped_are_finished_elsewhere_as_if_unbroken(
    in_process, one_thread, places, data_dir, tmp_path, number
):
    """Stopped between two steps or killed within one, the packed run ends with the weights of an unbroken one."""
    archive = tmp_path / "runs.zip"
    process = start(places, tmp_path, "--pack", archive, "--save_minutes", 0)
    end = time.monotonic() + 120
    while (len(packed_steps(archive)) < 2 or min(packed_steps(archive).values()) < 3) and time.monotonic() < end:
        time.sleep(0.1)
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == (1 if number == signal.SIGTERM else -number), output
    steps = packed_steps(archive)
    assert steps.keys() == {"cnn_rain800", "dsen_rain800"}
    if number == signal.SIGTERM:  # all that was done has been saved and packed
        assert steps == {name: checkpoints.load(tmp_path / "models" / name / "latest.pth").step for name in steps}

    ends = {}
    for place in ("elsewhere", "unbroken"):
        folders = ["--model_dir", tmp_path / place / "models", "--log_dir", tmp_path / place / "log"]
        here = [*folders, *SMALL, "--data_dir", data_dir, "--device", "cpu"]
        if place == "elsewhere":
            assert call("--take", archive, *here) == 0
        assert call("--run", "cnn_rain800", "--steps", steps["cnn_rain800"] + 2, *here) == 0
        ends[place] = checkpoints.load(tmp_path / place / "models" / "cnn_rain800" / "latest.pth")
        (tables.FOLDER / "cnn_rain800.json").unlink()
    resumed, whole = ends["elsewhere"], ends["unbroken"]
    assert resumed.step == whole.step == steps["cnn_rain800"] + 2
    assert all(torch.equal(resumed.network[name], weight) for name, weight in whole.network.items())
    moments = [end.optimizer["state"] for end in (resumed, whole)]
    assert all(torch.equal(moments[0][k][name], value) for k, v in moments[1].items() for name, value in v.items())

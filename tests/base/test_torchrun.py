"""Several processes on one command: the results of one process, one set of files and messages, and a common end."""

import importlib
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import main
import show
from base.console import run_script
from base.files import ROOT
from conftest import make_pair
from dataset import list_pairs
from runs import checkpoints
from test_main import read_csv, scalars

FULL = "-p sdsen_s2 --batch_size 4 --patch_size 64".split()
TINY = "-p sdsen_s2 --channel 2 --depth 4 --batch_size 5 --patch_size 16 --lr 1e-4".split()
OFTEN = "--device cpu --log_steps 1 --save_steps 2".split()

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Also in this process, so that sums have the same order: Adam amplifies gradients that are nearly 0."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a data set, of which 5 pairs to train, 3 to validate and 2 to test, in data."""
    folder = tmp_path_factory.mktemp("ranks")
    for split, count in (("train", 5), ("val", 3), ("test", 2)):
        (folder / "data" / split).mkdir(parents=True)
        for index in range(count):
            pair = make_pair(70 + 7 * (index % 2), 80, seed=10 * count + index)
            cv2.imwrite(str(folder / "data" / split / f"{index}.png"), np.hstack(pair))
    return folder


def places(folder, run):
    """The words that send everything to `folder`, and what belongs to a run to the run's folders there."""
    names = {"data_dir": "data", "model_dir": "models", "log_dir": "logs", "show_dir": "shown"}
    return ["--run", run, *(word for name, place in names.items() for word in (f"--{name}", str(folder / place)))]


def alone(folder, run, *words):
    """Trains in this process."""
    main.main(["-a", "train", *map(str, words), *OFTEN, *places(folder, run)])


def read(folder, run, name="latest"):
    return checkpoints.load(folder / "models" / run / f"{name}.pth")


def curve(folder, run, name):
    return [value for _, value in scalars(folder / "logs" / run)[name]]


def weights(state):
    return torch.cat([weight.flatten() for weight in state.network.values()])


def gradients(state):
    """The running means of the gradients, which show a factor that Adam's steps hide."""
    return torch.cat([moments["exp_avg"].flatten() for moments in state.optimizer["state"].values()])


def same_training(one, other):
    """Weights within 1e-6, gradients within a ten-thousandth."""
    near = (gradients(one) - gradients(other)).norm() < 1e-4 * gradients(other).norm()
    return one.step == other.step and near and (weights(one) - weights(other)).abs().max() < 1e-6


# ---------------------------------------------------------------- ways to start


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def torchrun(*words, script="main"):
    """torchrun with two processes, running; what they and torchrun print comes through one pipe."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    # Behind `--` stands what is not torchrun's: it would take --run for an option of its own.
    command = [*launch, "--", str(ROOT / "config" / f"{script}.py"), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.terminate()


def in_ranks(folder, count, words, script="main"):
    """Runs a script in processes as torchrun starts them, but quickly: [(exit status, output), ...] by rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "cv2", "tqdm", "tensorboardX.summary"])
    port, words = free_port(), [str(word) for word in words]
    outputs = [folder / f"rank_{rank}.txt" for rank in range(count)]
    processes = [
        context.Process(target=become_rank, args=(rank, count, port, output, script, words))
        for rank, output in enumerate(outputs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
        process.join()
    return [(process.exitcode, output.read_text()) for process, output in zip(processes, outputs, strict=True)]


def become_rank(rank, count, port, output, script, words):
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1")
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = [script, *words]
    run_script(importlib.import_module(script).main)


def train_in_ranks(folder, count, run, *words):
    """Trains in several processes; returns their outputs."""
    ended = in_ranks(folder, count, ["-a", "train", *words, *OFTEN, *places(folder, run)])
    assert [status for status, _ in ended] == [0] * count, ended
    return [output for _, output in ended]


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def trained(folder):
    """Five steps of the whole network: run `two` under torchrun, run `one` in this process. What torchrun printed."""
    with torchrun("-a", "train", *FULL, *OFTEN, "--steps", 5, "--val_images", 0, *places(folder, "two")) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    alone(folder, "one", *FULL, "--steps", 5, "--val_images", 0)
    return output


def test_weights_are_those_of_one_process(folder, trained):
    for name in ("step_2", "latest"):
        assert same_training(read(folder, "two", name), read(folder, "one", name))
    assert not same_training(read(folder, "two"), read(folder, "two", "step_4"))


def test_scores_are_those_of_one_process(folder, trained):
    assert read(folder, "two").best_psnr == pytest.approx(read(folder, "one").best_psnr, abs=1e-4)
    one, two = (scalars(folder / "logs" / run) for run in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one.keys() - {"train_speed/images_per_second", "train_speed/wait_share", "eval/preview"}:
        assert [step for step, _ in two[name]] == [step for step, _ in one[name]]
        assert [value for _, value in two[name]] == pytest.approx([value for _, value in one[name]], rel=1e-4)


def test_one_process_writes_and_prints(folder, trained):
    assert "rank 1" not in trained
    logs = folder / "logs" / "two"
    printed = trained.splitlines()
    messages = re.sub(r"(?m)^\d+-\d+-\d+ \S+ ", "", (logs / "train.log").read_text()).splitlines()
    assert len(messages) >= 5 + 3  # steps and validations
    assert [printed.count(message) for message in messages] == [1] * len(messages)
    steps = {f"step_{step}.pth" for step in (2, 4, 5)}
    assert {path.name for path in (folder / "models" / "two").iterdir()} == {"latest.pth", "best.pth", *steps}
    written = sorted(path.name.partition(".tfevents")[0] for path in logs.iterdir())
    assert written == ["events.out", "preview.png", "settings.json", "train.log"]


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_training_resumes_with_another_number_of_processes(folder, first, then):
    run = f"{first}_then_{then}"
    for count, steps in ((first, 2), (then, 4)):
        words = [*TINY, "--steps", steps]
        alone(folder, run, *words) if count == 1 else train_in_ranks(folder, count, run, *words)
    alone(folder, f"unbroken_{run}", *TINY, "--steps", 4)
    assert read(folder, run).step == 4
    assert same_training(read(folder, run), read(folder, f"unbroken_{run}"))


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("uneven", []),
        ("parts", ["--accumulate", 2, "--checkpoint_activations", "true"]),
        ("stage", ["--stage_num", 1]),  # whose connections' filters take no part
        ("clipped", ["--clip_norm", 1e-2]),
    ],
)
def test_uneven_batches_are_those_of_one_process(folder, run, words):
    _, second = train_in_ranks(folder, 2, f"{run}_two", *TINY, *words, "--steps", 4, "--val_images", 1)
    assert "rank 1: " not in second  # PyTorch 2.4 may warn there
    alone(folder, f"{run}_one", *TINY, *words, "--steps", 4, "--val_images", 1)
    assert same_training(*(read(folder, f"{run}_{count}") for count in ("two", "one")))
    for name in ("train/loss", "train_stages/psnr_1", "train_stages/ssim_1", "val_stages/psnr_1"):
        found, wanted = (curve(folder, f"{run}_{count}", name) for count in ("two", "one"))
        assert len(found) == (2 if name.startswith("val") else 4)
        assert found == pytest.approx(wanted, rel=1e-5)


def test_a_segmentation_that_is_trained_along_is_that_of_one_process(folder):
    """It is not within DistributedDataParallel. All pixels have labels: each process takes the mean of its own."""
    (folder / "data" / "train" / "label").mkdir()
    for path in list_pairs(folder / "data" / "train"):
        level = cv2.imread(str(path))[:, :80, 0]
        cv2.imwrite(str(path.parent / "label" / path.name), np.where(level < 100, 18, 7).astype(np.uint8))
    words = "-p php --epochs 0 --milestones 3 --batch_size 5 --patch_size 16 --lr 1e-5 --val_images 1".split()
    train_in_ranks(folder, 2, "labels_two", *words, "--steps", 3)
    alone(folder, "labels_one", *words, "--steps", 3)
    two, one, earlier = read(folder, "labels_two"), read(folder, "labels_one"), read(folder, "labels_one", "step_2")
    assert same_training(two, one)
    segmentations = [torch.cat([w.flatten() for w in state.criterion.values()]) for state in (two, one, earlier)]
    assert (segmentations[0] - segmentations[1]).abs().max() < 1e-6
    assert (segmentations[2] - segmentations[1]).abs().max() > 5e-6
    for name in ("segmentation", "colour", "loss"):
        found, wanted = (curve(folder, f"labels_{count}", f"train/{name}") for count in ("two", "one"))
        assert found == pytest.approx(wanted, rel=1e-5)


def test_more_processes_than_validation_pairs(folder):
    train_in_ranks(folder, 3, "few_pairs_three", *TINY, "--steps", 2, "--val_images", 2)
    alone(folder, "few_pairs_one", *TINY, "--steps", 2, "--val_images", 2)
    three, one = (read(folder, f"few_pairs_{count}") for count in ("three", "one"))
    assert three.best_psnr == pytest.approx(one.best_psnr, abs=1e-4)
    previews = [(folder / "logs" / f"few_pairs_{count}" / "preview.png").read_bytes() for count in ("three", "one")]
    assert previews[0] == previews[1]


# ---------------------------------------------------------------- endings


def start_long_run(folder, run):
    words = [*TINY, "--device", "cpu", "--steps", 10**5, "--log_steps", 1, "--save_steps", 10]
    return torchrun("-a", "train", *words, "--val_images", 1, *places(folder, run))


def wait_for(path, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} was not written"
        time.sleep(0.05)


def children(process):
    return [int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_sigterm_ends_all_after_the_same_step(folder):
    with start_long_run(folder, "stopped") as process:
        wait_for(folder / "models" / "stopped" / "latest.pth")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert read(folder, "stopped").step == len(curve(folder, "stopped", "train/loss"))


def test_a_validation_is_given_up_by_all_where_one_is_interrupted(folder):
    """The signal reaches one process alone, in the middle of a validation; the resumed run makes it good."""
    shutil.copytree(folder / "data", folder / "large")
    cv2.imwrite(str(folder / "large" / "val" / "1.png"), np.hstack(make_pair(600, 600)))
    words = [
        *TINY,
        "--steps",
        2,
        *OFTEN,
        "--save_steps",
        1,
        *places(folder, "given_up"),
        "--data_dir",
        folder / "large",
    ]
    with torchrun("-a", "train", *words) as process:
        while not process.stdout.readline().startswith("step 1/"):
            pass
        os.kill(children(process)[1], signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    models = folder / "models" / "given_up"
    assert [path.name for path in models.iterdir()] == ["latest.pth"]
    train_in_ranks(folder, 2, "given_up", *TINY, "--steps", 1, "--data_dir", folder / "data")
    assert read(folder, "given_up", "step_1").best_psnr is not None


@pytest.mark.skipif(sys.platform != "linux", reason="where the list of processes lies is Linux's")
def test_a_killed_process_ends_the_others(folder):
    latest = folder / "models" / "killed" / "latest.pth"
    with start_long_run(folder, "killed") as process:
        wait_for(latest)
        os.kill(children(process)[1], signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    (line,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert str(latest) in line
    step = read(folder, "killed").step
    alone(folder, "killed", "--steps", step + 2)
    assert read(folder, "killed").step == step + 2


def test_a_batch_too_small_for_the_processes_is_refused(folder):
    (status, first), (other_status, second) = in_ranks(
        folder, 2, ["-a", "train", *TINY, "--batch_size", 1, "--log_level", "warning", *places(folder, "small")]
    )
    assert (status, other_status) == (2, 2)
    assert second == f"rank 1: {first}"
    assert not (folder / "models" / "small").exists()


def test_a_missing_checkpoint_is_one_error(folder, trained):
    words = ["-a", "test", "-m", "nothing", *places(folder, "two")]
    (status, first), (other_status, second) = in_ranks(folder, 2, words)
    assert (status, other_status) == (2, 2)
    assert first.startswith("error: ")
    assert (first.count("\n"), second) == (1, "")


# ---------------------------------------------------------------- test and show


def test_the_table_is_that_of_one_process(folder, trained):
    count = 3  # more than there are images
    words = ["-a", "test", "-m", "two/latest", "--device", "cpu", *places(folder, "two"), "--log_dir"]
    ended = in_ranks(folder, count, [*words, folder / f"table_{count}"])
    assert [status for status, _ in ended] == [0] * count
    assert [output for _, output in ended[1:]] == [""] * (count - 1)
    main.main([*words, str(folder / "table_1")])
    tables = [list((folder / f"table_{n}").rglob("*.csv")) for n in (count, 1)]
    assert [len(table) for table in tables] == [1, 1]
    assert tables[0][0].read_bytes() == tables[1][0].read_bytes()


def test_a_broken_pair_of_one_process_keeps_the_scores_of_all(folder, trained):
    data = folder / "broken"
    shutil.copytree(folder / "data" / "val", data / "test")
    (data / "test" / "1.png").write_text("no image")
    words = ["-a", "test", "-m", "two/latest", *places(folder, "two"), "--data_dir", data, "--log_dir", folder / "kept"]
    ended = in_ranks(folder, 2, [*words, "--device", "cpu"])
    assert [status for status, _ in ended] == [1, 0], ended
    (table,) = (folder / "kept").rglob("*.csv")
    assert [row["image"] for row in read_csv(table)] == ["0.png", "2.png"]


def test_the_table_of_both_trainings_is_the_same(folder, trained):
    for run in ("one", "two"):
        main.main(["-a", "test", "-m", f"{run}/latest", "--device", "cpu", *places(folder, run)])
    one, two = (read_csv(folder / "logs" / run / "test_latest.csv") for run in ("one", "two"))
    for row, other in zip(one, two, strict=True):
        numbers, others = ([float(value) for name, value in r.items() if name != "image"] for r in (row, other))
        assert others == pytest.approx(numbers, abs=1e-3)


@pytest.mark.parametrize("split", ["pairs", "images"])
def test_images_and_page_are_those_of_one_process(folder, trained, split):
    words = ["-m", "two/latest", "--all-stages", "--device", "cpu", *places(folder, "two")]
    if split == "images":
        bad = folder / "bad.png"
        bad.write_text("no image")
        words += ["-i", folder / "data" / "val", bad]  # four images, of which the second process skips the last
    found = {}
    ended = in_ranks(folder, 2, [*words, "--show_dir", folder / f"{split}_two"], script="show")
    status = show.main([str(word) for word in (*words, "--show_dir", folder / f"{split}_one")])
    assert [status for status, _ in ended] == [status, 0]
    assert status == (split == "images")
    assert ("rank 1: skipped: " in ended[1][1]) == (split == "images")
    for count in ("one", "two"):
        where = folder / f"{split}_{count}"
        paths = sorted(path for path in where.rglob("*") if path.is_file())
        found[count] = {path.relative_to(where): path.read_bytes() for path in paths}
        for path in (path for path in found[count] if path.suffix in (".html", ".json")):
            found[count][path] = re.sub(rb'"(seconds|time)": [\d.]+', b"", found[count][path])
    assert found["two"] == found["one"]
    entries = [path for path in found["two"] if path.name == "entry.json"]
    results = [path for path in found["two"] if path.parent == Path("two") and path.suffix == ".png"]
    assert [len(entries), len(results)] == ([3, 3 * 3] if split == "images" else [2, 2 * 3])

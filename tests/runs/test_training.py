"""Trainings in this process: learning, curves, log, best and averaged weights, errors that keep the last checkpoint."""

import json
import os
import re
import shlex
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

import convert
import fake_graphs
import main
import show
from base.errors import BadArgument, DamagedFile, NotFinite, NotWritable, OutOfMemory
from commands import LONG, OTHERS, SMALL, TINY, call, events, files, read, read_csv, same_state, same_weights, scalars
from conftest import write_vgg
from fake_cuda import keep_on_cpu
from runs import checkpoints, curves, restore, training
from runs.restore import BAND


def test_training_lowers_the_loss(places, tmp_path):
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1, "--run", "a")
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 60, "--save_steps", 60, "--run", "b", "--lr", "1e-2")
    assert read(tmp_path, "best", "b").best_psnr > read(tmp_path, "best", "a").best_psnr + 3


@pytest.mark.slow
def test_training_in_little_memory_lowers_the_loss(places, tmp_path):
    """In bfloat16, in two parts, with repeated stages."""
    words = "--precision bf16 --checkpoint_activations true --accumulate 2 --lr 1e-2 --steps 60 --save_steps 60".split()
    call("-a", "train", *SMALL, *LONG, *places, *words)
    losses = [loss for _, loss in scalars(tmp_path / "log_dir" / "sdsen")["train/loss"]]
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:5])


def test_curves_log_and_files(places, tmp_path):
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 4, "--milestones", 2)
    curves = scalars(tmp_path / "log_dir" / "sdsen")
    for split, steps in (("train", [1, 2, 3, 4]), ("val", [2, 4])):
        for stage in (1, 2):
            for metric in ("loss", "psnr", "ssim"):
                points = curves[f"{split}_stages/{metric}_{stage}"]
                assert [step for step, _ in points] == steps
                assert np.isfinite([value for _, value in points]).all()
    assert [value for _, value in curves["train/lr"]] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
    assert min(value for _, value in curves["train_speed/images_per_second"]) > 0
    losses = (curves[name] for name in ("train/loss", "train_stages/loss_1", "train_stages/loss_2"))
    for loss, first, second in zip(*losses, strict=True):
        assert loss[1] == pytest.approx(first[1] + second[1], rel=1e-5)
    preview = cv2.imread(str(tmp_path / "log_dir" / "sdsen" / "preview.png"))
    assert "eval/preview" in curves  # TensorBoard shows it too
    assert preview.shape == (BAND + 40, 4 * 48, 3)  # O, two stages, B, each below its name
    assert (preview[BAND:, -48:] == cv2.imread(str(tmp_path / "data" / "val" / "0.png"))[:, :48]).all()
    names = {path.stem for path in (tmp_path / "model_dir" / "sdsen").iterdir()}
    assert names == {"latest", "best", "step_2", "step_4"}
    settings = json.loads((tmp_path / "log_dir" / "sdsen" / "settings.json").read_text())
    assert (settings["channel"], settings["milestones"]) == (2, [2])


def test_the_best_checkpoint_is_written_before_the_state_that_knows_its_score(places, monkeypatch):
    saved = []
    monkeypatch.setattr(checkpoints, "save", lambda path, state: saved.append(path.stem))
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    assert saved == ["best", "latest", "step_1"]


def test_latest_is_written_when_its_minutes_are_over_and_validation_is_not_counted_as_speed(
    places, tmp_path, monkeypatch, scripted
):
    """On a clock that only steps (40 s) and validations (1000 s) move: a checkpoint every second step."""
    clock, saved = SimpleNamespace(now=0.0, time=time.time), []
    clock.monotonic = lambda: clock.now
    scripted((20, 20), (20, 20))
    step, validate = main.train_step, training.validate

    def slow_step(*arguments, **keywords):
        clock.now += 40
        return step(*arguments, **keywords)

    def slow_validation(*arguments):
        clock.now += 1000
        return validate(*arguments)

    for module in (main, training):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(main, "train_step", slow_step)
    monkeypatch.setattr(training, "validate", slow_validation)
    monkeypatch.setattr(checkpoints, "save", lambda path, state: saved.append((path.stem, state.step)))
    words = ["--save_minutes", 1, "--save_steps", 5, "--steps", 6]
    call("-a", "train", *SMALL, *LONG, *places, *words)
    assert [number for name, number in saved if name == "latest"] == [2, 4, 5, 6]
    speeds = [value for _, value in scalars(tmp_path / "log_dir" / "sdsen")["train_speed/images_per_second"]]
    assert speeds == pytest.approx([2 / 40] * 6)


def test_a_training_that_is_stopped_one_step_before_its_last_is_saved_there(places, tmp_path, monkeypatch):
    step, calls = main.train_step, []

    def step_and_stop(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(*arguments, **keywords)

    monkeypatch.setattr(main, "train_step", step_and_stop)
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 4, "--save_steps", 10)
    assert (len(calls), read(tmp_path, "latest").step) == (3, 3)


def test_curves_are_in_order_and_the_settings_are_a_text(places, tmp_path):
    """TensorBoard sorts by name, and opens the first two groups."""
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 2)
    tags = sorted(scalars(tmp_path / "log_dir" / "sdsen"))
    groups = list(dict.fromkeys(tag.split("/")[0] for tag in tags if not tag.startswith("settings")))
    assert groups == ["eval", "train", "train_speed", "train_stages", "val_stages"]
    assert [tag for tag in tags if tag.startswith("eval")] == [
        f"eval/{name}" for name in ("preview", "psnr", "psnr_input", "ssim")
    ]
    [value] = [
        value
        for event in events(tmp_path / "log_dir" / "sdsen")
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "text"
    ]
    table = value.tensor.string_val[0].decode()
    assert {"| channel | 2 |", "| use_se | true |", "| rain |  |"} <= {*table.splitlines()}


def test_slow_steps_show_a_line_a_minute_and_no_more(places, tmp_path, monkeypatch):
    lines, now = [], [0.0]
    monkeypatch.setattr(training.log, "info", lines.append)
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    step = main.train_step

    def slow_step(*arguments, **keywords):
        now[0] += 9
        return step(*arguments, **keywords)

    monkeypatch.setattr(main, "train_step", slow_step)
    call("-a", "train", *SMALL, *places, "--steps", 20, "--log_steps", 12, "--save_steps", 20)
    assert [line.split()[2] for line in lines if line.startswith("at step")] == ["7", "19"]


@pytest.mark.parametrize("stopped_at", [2, 4])
def test_a_validation_that_is_stopped_is_made_good(places, tmp_path, monkeypatch, stopped_at):
    """It ends with the image's score that is being computed; the resumed run is the unbroken one."""
    words = ["-a", "train", *SMALL, *LONG, *places, "--steps", 4]
    call(*words, "--run", "unbroken")
    calls, scores = [], restore.scores

    def score_and_stop(*images):
        calls.append(1)
        if len(calls) == 6 * (stopped_at // 2 - 1) + 2:  # six scores of two pairs in each validation
            signal.raise_signal(signal.SIGTERM)
        return scores(*images)

    monkeypatch.setattr(restore, "scores", score_and_stop)
    call(*words)
    assert len(calls) == 6 * (stopped_at // 2 - 1) + 2
    assert read(tmp_path, "latest").step == stopped_at
    assert not (tmp_path / "model_dir" / "sdsen" / f"step_{stopped_at}.pth").exists()
    call(*words)
    for name in ("step_2", "step_4", "best", "latest"):
        one, other = read(tmp_path, name), read(tmp_path, name, "unbroken")
        assert same_state(one, other)
        assert one.best_psnr == other.best_psnr
    before = len(calls)
    call(*words)  # nothing is owed now
    assert len(calls) == before


def test_a_validation_pair_that_breaks_meanwhile_costs_no_step(places, tmp_path, monkeypatch):
    step, pair = main.train_step, tmp_path / "data" / "val" / "2.png"
    content = pair.read_bytes()

    def step_and_break(*arguments, **keywords):
        pair.write_text("no image")
        return step(*arguments, **keywords)

    monkeypatch.setattr(main, "train_step", step_and_break)
    words = ["-a", "train", *SMALL, *LONG, *places, "--steps", 2]
    with pytest.raises(DamagedFile, match=re.escape(str(pair))):
        call(*words)
    assert read(tmp_path, "latest").step == 2
    pair.write_bytes(content)
    call(*words)
    assert read(tmp_path, "step_2").best_psnr is not None


def test_an_infinite_moment_replaces_no_checkpoint(places, tmp_path, monkeypatch):
    """Adam would not move such a weight again, and its loss stays finite."""
    step = main.train_step

    def overflow(network, optimizer, *arguments, **keywords):
        result = step(network, optimizer, *arguments, **keywords)
        optimizer.state[network.dec[3].bias]["exp_avg_sq"][0] = float("inf")
        return result

    monkeypatch.setattr(main, "train_step", overflow)
    with pytest.raises(NotFinite):
        call("-a", "train", *SMALL, *LONG, *places, "--steps", 2)
    assert not files(tmp_path / "model_dir")


def test_a_run_without_test_pairs_says_how_to_add_some(places, data_dir, tmp_path):
    (data_dir / "test").rename(tmp_path / "DIR")
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    words = shlex.split((tmp_path / "log_dir" / "sdsen" / "train.log").read_text().splitlines()[-1])
    assert words[1].endswith("convert.py")
    convert.main([str(tmp_path / "DIR") if word == "DIR" else word for word in words[2:]])
    assert len(list((data_dir / "test").iterdir())) == 2


def test_the_log_of_a_run_starts_with_its_settings_and_validation_pairs(places, tmp_path):
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    lines = (tmp_path / "log_dir" / "sdsen" / "train.log").read_text().splitlines()
    first_step = next(number for number, line in enumerate(lines) if " step 1/1 " in line)
    before, after = lines[:first_step], lines[first_step:]
    assert {f"  {field} = {value}" for field, value in (("channel", 2), ("lr", 0.001), ("val_images", 2))} <= {*before}
    assert str(tmp_path / "data" / "val") in "".join(before)
    assert str(tmp_path / "model_dir" / "sdsen" / "best.pth") in after[-2]
    call(*shlex.split(after[-1])[2:])  # the command that comes next
    assert len(read_csv(tmp_path / "log_dir" / "sdsen" / "test_best.csv")) == 2


@pytest.fixture
def scripted(monkeypatch):
    """A function that makes validations give these PSNRs by stage; returns the list of the weights that they score."""

    def script(*psnrs):
        validated, rows = [], iter(psnrs)

        def validate(network, *_):
            first, last = next(rows)
            validated.append({name: weight.clone() for name, weight in network.state_dict().items()})
            result = {"psnr": last, "ssim": 0.5, "psnr_input": 20.0, "stage_1/psnr": first, "stage_2/psnr": last}
            return result, np.zeros((4, 4, 3), np.uint8)

        monkeypatch.setattr(training, "validate", validate)
        return validated

    return script


def test_best_is_kept_where_a_later_validation_is_worse(places, tmp_path, scripted):
    """Though stage 1 gets better all the time."""
    scripted((20, 24), (21, 26), (22, 25), (23, 23))
    call("-a", "train", *SMALL, *LONG, *places, "--save_steps", 1, "--steps", 4)
    assert [read(tmp_path, f"step_{step}").best_psnr for step in (1, 2, 3, 4)] == [24, 26, 26, 26]
    best = read(tmp_path, "best")
    assert (best.step, best.best_psnr) == (2, 26)
    assert same_weights(best.network, read(tmp_path, "step_2").network)


def test_the_validated_score_is_that_of_the_last_stage(places, tmp_path):
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 2, "--lr", "1e-2")
    curves = scalars(tmp_path / "log_dir" / "sdsen")
    for metric in ("psnr", "ssim"):
        first, second = (curves[f"val_stages/{metric}_{stage}"][-1] for stage in (1, 2))
        assert curves[f"eval/{metric}"][-1] == second != first
    assert read(tmp_path, "latest").best_psnr == pytest.approx(max(v for _, v in curves["eval/psnr"]), rel=1e-6)


def test_validation_pairs_are_spread_over_val(places, monkeypatch):
    validate, scored = training.validate, []

    def noted(network, criterion, paths, *rest):
        scored.append([path.name for path in paths])
        return validate(network, criterion, paths, *rest)

    monkeypatch.setattr(training, "validate", noted)
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1, "--val_images", 2)
    assert scored == [["0.png", "2.png"]]


def test_the_averaged_weights_are_validated(places, tmp_path, scripted):
    validated = scripted((20, 20), (20, 20))
    call("-a", "train", *SMALL, *LONG, *places, "--average", 0.5, "--save_steps", 1, "--steps", 2)
    state = read(tmp_path, "step_2")
    assert same_weights(validated[1], state.average)
    assert not same_weights(validated[1], state.network)


def test_average_is_the_moving_one(places, tmp_path):
    """After three steps w1, w2, w3 with decay 0.75: the first step's weights, then a quarter of each new one's."""
    words = ["-a", "train", *SMALL, *LONG, *places, "--average", 0.75, "--save_steps", 1]
    call(*words, "--steps", 3)
    w1, w2, w3 = (read(tmp_path, f"step_{step}").network["dec.3.weight"] for step in (1, 2, 3))
    expected = 0.75 * (0.75 * w1 + 0.25 * w2) + 0.25 * w3
    assert (read(tmp_path, "latest").average["dec.3.weight"] - expected).abs().max() < 1e-7


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_train_and_test_and_show(places, tmp_path, name):
    call("-a", "train", *OTHERS[name], *TINY, *LONG, *places, "--steps", 2)
    call("-a", "test", *places, "-m", name)
    rows = read_csv(tmp_path / "log_dir" / name / "test_best.csv")
    outputs = {"coarse2fine": 3, "php": 2}[name]
    columns = [column for column in rows[0] if column.startswith("psnr_stage")]
    assert columns == [f"psnr_stage_{t}" for t in range(1, outputs + 1)]
    assert show.main(["-m", name, "--all-stages", *places]) == 0
    for row in rows:
        truth = cv2.imread(str(tmp_path / "data" / "test" / row["image"]))[:, :48].astype(float)
        stem = row["image"].removesuffix(".png")
        for t in range(1, outputs + 1):
            shown = cv2.imread(str(tmp_path / "show_dir" / name / f"{stem}_stage{t}.png"))
            psnr = 10 * np.log10(255**2 / np.mean((shown - truth) ** 2))
            assert float(row[f"psnr_stage_{t}"]) == pytest.approx(psnr, abs=1e-4)
    curves = scalars(tmp_path / "log_dir" / name)
    assert [value for _, value in curves["train/lr"]] == pytest.approx([1e-3, 1e-3])
    assert f"val_stages/ssim_{outputs}" in curves
    assert f"val_stages/ssim_{outputs + 1}" not in curves


def test_terms_of_the_loss_are_curves(places, tmp_path, label_dir):
    vgg = tmp_path / "vgg.pth"
    write_vgg(vgg)
    call("-a", "train", *OTHERS["php"], *TINY, *LONG, *places, "--steps", 3)
    call("-a", "train", *OTHERS["coarse2fine"], *TINY, *LONG, *places, "--steps", 3, "--vgg_weights", vgg)
    stages = [f"{metric}_{t}" for t in (1, 2, 3) for metric in ("loss", "psnr", "ssim")]
    always = {"loss", "psnr", "lr"}
    for name, terms, factors in (
        ("php", {"colour", "segmentation", *stages[:6]}, {"colour": 0.1, "segmentation": 0.05}),
        ("coarse2fine", {"l1", "vgg", *stages}, {}),
    ):
        curves = scalars(tmp_path / "log_dir" / name)
        train = {
            tag.split("/")[1]: curve for tag, curve in curves.items() if tag.split("/")[0] in ("train", "train_stages")
        }
        assert train.keys() == always | terms
        summed = {term: 1 for term in terms if term.startswith("loss_")} | factors
        for index in range(3):
            assert [points[index][0] for points in train.values()] == [index + 1] * len(train)
            parts = sum(factor * train[term][index][1] for term, factor in summed.items())
            assert train["loss"][index][1] == pytest.approx(parts, rel=1e-5)
            assert min(train[term][index][1] for term in terms) > 0
    train = {key: train[key][0][1] for key in ("l1", "vgg", "loss_3")}
    assert train["l1"] + train["vgg"] == pytest.approx(train["loss_3"], rel=1e-5)
    assert read(tmp_path, "latest", "coarse2fine").criterion == {}  # VGG's are in their own file


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_first_step_in_bf16(places, tmp_path, label_dir, name):
    first = {}
    for run, words in (
        ("float32", ["--precision", "float32"]),
        ("bf16", ["--precision", "bf16", "--checkpoint_activations", "true", "--accumulate", 2]),
    ):
        call("-a", "train", *OTHERS[name], *TINY, *LONG, *places, *words, "--steps", 1, "--run", run)
        first[run] = {tag: points[0][1] for tag, points in scalars(tmp_path / "log_dir" / run).items()}
    terms = {"loss", *(["colour", "segmentation"] if name == "php" else ["l1"])}
    tags = ("train_stages/loss_1", "train_stages/loss_2", *(f"train/{term}" for term in terms))
    half, full = ({tag.split("/")[1]: values[tag] for tag in tags} for values in (first["bf16"], first["float32"]))
    # Parts of a batch have their own mean over the pixels that have labels.
    assert half.pop("segmentation", 0) == pytest.approx(full.pop("segmentation", 0), rel=0.2)
    assert half == pytest.approx(full, rel=0.01)
    assert half["loss"] != full["loss"]


@pytest.mark.filterwarnings("ignore:.*pin_memory")
@pytest.mark.parametrize(("device", "index"), [("auto", 0), ("cuda:1", 1)])
def test_commands_on_a_card(places, tmp_path, cards, monkeypatch, device, index):
    """The cards are fake (fake_cuda.py): PyTorch's calls to them are checked, and the tensors stay on the CPU."""
    cards((8, 0), (8, 0))
    devices = keep_on_cpu(monkeypatch)
    fake_graphs.install(monkeypatch)
    torch.cuda.set_device(0)
    generator = torch.cuda.default_generators[index]
    call("-a", "train", *SMALL[:-2], *LONG, *places, "--group", "z2", "--device", device, "--steps", 1)
    saved = read(tmp_path, "latest")
    assert torch.equal(saved.random["cuda"], generator.get_state())
    assert saved.device == f"Card {index}"
    generator.manual_seed(5)
    call("-a", "train", *places, "--steps", 2)
    assert torch.equal(saved.random["cuda"], generator.get_state())
    call("-a", "test", "-m", "sdsen", *places)
    show.main(["-m", "sdsen", *places])
    assert set(devices) == {torch.device("cuda", index)}


def test_float16_is_not_for_training(places):
    with pytest.raises(BadArgument):
        call("-a", "train", *SMALL, *places, "--steps", 1, "--precision", "fp16")


def test_loss_that_is_not_finite_stops_the_run(places, tmp_path):
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 2)
    before = read(tmp_path, "latest")
    with pytest.raises(NotFinite, match=re.escape(str(tmp_path / "model_dir" / "sdsen" / "latest.pth"))):
        call("-a", "train", *places, "--lr", "1e30", "--steps", 50, "--save_steps", 50, "--milestones")
    assert same_state(read(tmp_path, "latest"), before)
    assert len(main.log.handlers) == 1  # train.log's is closed


def test_weights_that_are_not_finite_replace_no_checkpoint(places, tmp_path, monkeypatch):
    """The loss of a step is finite, its gradient is not, and a checkpoint is due right behind it."""
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 2)
    before = files(tmp_path / "model_dir")
    states = {name: read(tmp_path, name) for name in ("latest", "best")}

    def spoil(network, *arguments, **keywords):
        result = step(network, *arguments, **keywords)
        network.dec[3].bias.data[0] = float("nan")
        return result

    step = main.train_step
    monkeypatch.setattr(main, "train_step", spoil)
    with pytest.raises(NotFinite):
        call("-a", "train", *places, "--steps", 3)
    assert files(tmp_path / "model_dir") == before
    assert all(same_state(read(tmp_path, name), state) for name, state in states.items())


def test_a_full_memory_is_one_line_that_says_what_takes_less(places, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate\n 2.00 GiB")

    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    monkeypatch.setattr(main, "train_step", full)
    with pytest.raises(OutOfMemory, match=r"--accumulate 6\b") as error:
        call("-a", "train", *places, "--accumulate", 3, "--steps", 2)
    assert "\n" not in str(error.value)


def test_another_error_of_a_step_comes_through(places, monkeypatch):
    def wrong(*_, **__):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(main, "train_step", wrong)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_full_disk_is_one_error(tmp_path, monkeypatch):
    points = curves.Curves(tmp_path, 0)
    points.add(1, "train", {"a": 1.0})
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(points.writer, "_writer", full)
        with pytest.raises(NotWritable):
            points.add(2, "train", {"a": 1.0, "b": 2.0})
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == size


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_a_log_on_a_full_disk_costs_no_training(places, tmp_path):
    (tmp_path / "log_dir" / "sdsen").mkdir(parents=True)
    (tmp_path / "log_dir" / "sdsen" / "train.log").symlink_to("/dev/full")
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1)
    assert read(tmp_path, "latest").step == 1
    assert len(main.log.handlers) == 1


def test_a_data_set_whose_path_is_no_utf8_can_be_trained_on(places, tmp_path):
    data = Path(os.fsdecode(os.fsencode(tmp_path) + b"/data\xff"))
    (tmp_path / "data").rename(data)
    call("-a", "train", *SMALL, *LONG, *places, "--steps", 1, "--data_dir", data)
    assert read(tmp_path, "latest").step == 1


def test_a_resumed_run_drops_the_points_behind_its_checkpoint_and_no_others(tmp_path):
    """TensorBoard drops what lies at the step of a start, or behind it."""
    curves.Curves(tmp_path, 7)
    assert [event.step for event in events(tmp_path) if event.HasField("session_log")] == [8]


def test_without_tensorboardx_there_is_a_line_and_no_file(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(curves, "Event", None)
    monkeypatch.setattr(curves.log, "warning", lines.append)
    nothing = curves.Curves(tmp_path, 0)
    nothing.add(1, "train", {"a": 1.0})
    assert len(lines) == 1
    assert not list(tmp_path.iterdir())

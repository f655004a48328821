"""The benchmark: the plain reference has the published outputs, the networks agree with it, and both are measured."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import bench
import busy
import convolutions
import model
import reference
import report
import sections
import timing
import trainings
import workloads
from base.errors import BadArgument, LostProcess, UserError
from base.files import ROOT
from conftest import GOLDEN
from fast import winograd
from runs import checkpoints
from settings import resolve

CPU = torch.device("cpu")


def both(name, seed=0):
    """The network and the plain one, with the same weights."""
    torch.manual_seed(seed)
    network = model.build(name)
    return network, reference.build(resolve(name), network.state_dict())


@pytest.mark.parametrize("name", ["dsen", "sdsen"])
def test_reference_has_the_published_outputs_at_every_stage(name):
    arrays = np.load(GOLDEN / f"{name}.npz")
    state = {key.removeprefix("state/"): torch.tensor(arrays[key]) for key in arrays.files if key.startswith("state/")}
    plain = reference.build(resolve(name), state)
    with torch.inference_mode():
        rain_layers = plain(torch.tensor(arrays["input"]))
    for R, expected in zip(rain_layers, torch.tensor(arrays["output"]), strict=True):
        assert (R - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["dsen", "mdsen", "sdsen_s4"])
@pytest.mark.parametrize("training", [True, False])
def test_network_agrees_with_the_reference_at_an_odd_size(name, training):
    network, plain = both(name)
    O = torch.rand(2, 3, 37, 23)
    with torch.inference_mode(not training):
        pairs = list(zip(network.train(training)(O), plain.train(training)(O), strict=True))
    assert max((a - b).abs().max() for a, b in pairs) < 1e-5


@pytest.mark.parametrize("name", ["dsen", "sdsen_s2"])
def test_network_has_the_gradients_of_the_reference(name):
    network, plain = both(name)
    O, B = torch.rand(2, 2, 3, 21, 30)
    for other in (network, plain):
        sum(torch.nn.functional.mse_loss(R, O - B) for R in other(O)).backward()
    gradients = dict(plain.named_parameters())
    for parameter_name, parameter in network.named_parameters():
        expected = gradients[parameter_name].grad
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm(), parameter_name


@pytest.mark.parametrize("name", ["cnn", "dsen_maxpool", "dsen_wo_se", "mdsen_sc"])
def test_reference_refuses_other_networks(name):
    with pytest.raises(BadArgument):
        reference.build(resolve(name), {})


def tiny_job(**values):
    """A job on the CPU that is over at once."""
    return sections.Job(CPU, sections.Sizes((17, 22), 2, 2, 16, 64, 0.0), 1, **values)


@pytest.mark.parametrize("kind", sections.KINDS)
def test_both_sides_are_measured_and_agree(monkeypatch, kind):
    monkeypatch.setattr(sections, "PRESET", "sdsen_s2")
    monkeypatch.setattr(sections.Job, "peak", lambda job, kind, name, first: first)
    job = tiny_job()
    monkeypatch.setattr(job, "settings", lambda preset="sdsen_s2": resolve(preset))
    job.limits = bench.measure_limits(CPU, 64)
    numbers, text = sections.compare(kind, job)
    assert numbers["difference"] < 1e-5
    assert [len(numbers[side]["seconds"]) for side in sections.SIDES] == [1, 1]
    pixels = {"inference": 17 * 22, "images": 2 * 17 * 22, "training": 3 * 2 * 16 * 16}[kind]
    assert numbers["nominal_gflop"] == pytest.approx(2e-9 * 2 * 493030 * pixels)
    assert f"{numbers['speedup']:.2f}" in text
    assert len(text.splitlines()) == 9


@pytest.mark.slow
def test_peak_memory_is_measured_in_a_fresh_process():
    job = sections.Job(CPU, sections.SIZES["rehearsal"])
    peak = job.peak("training", "this code", {})
    assert peak["before"] > 2**26
    assert peak["added"] > 2**20


def test_variants_are_those_of_the_device():
    on_cpu, on_gpu = (set(workloads.variants_for(torch.device(kind))) for kind in ("cpu", "cuda"))
    assert on_cpu | on_gpu == set(workloads.VARIANTS)
    assert on_cpu - on_gpu == {"float32 without a C++ compiler"}
    assert on_gpu - on_cpu == {"bf16, --cuda_graphs off"}
    assert set(workloads.SIDES) | set(workloads.STEPS["cpu"]) <= on_cpu
    assert set(workloads.STEPS["cuda"]) <= on_gpu


def test_runs_are_repeated_in_turn():
    calls = []
    runs = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = timing.alternate(runs, CPU, 3, 0)
    assert "".join(calls) == "ababab"
    assert [len(s) for s in seconds.values()] == [3, 3]
    assert len(timing.alternate(runs, CPU, None, 0)["a"]) == timing.LEAST
    assert len(timing.alternate(runs, CPU, None, 60)["a"]) == timing.MOST


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_first_call_on_cuda_counts_the_tensors_of_its_peak():
    device, kept = torch.device("cuda"), []

    def run():
        kept.append(torch.zeros(2**20, device=device))
        return torch.zeros(2**22, device=device).sum().item()

    result, peak = timing.first_call(run, device)
    assert result == 0
    assert 4 * (2**20 + 2**22) <= peak["added"] < 4 * (2**20 + 2**23)


def test_sections_write_their_numbers_and_a_failure_does_not_stop_the_next(tmp_path, monkeypatch):
    def fails(job):
        raise RuntimeError("on purpose")

    fake = {"inference": fails, "data": lambda job: ({"found": job.sizes.batch}, "a table")}
    monkeypatch.setattr(bench, "SECTIONS", fake)
    job, path = tiny_job(), tmp_path / "numbers.json"
    bench.bench(job, ["inference", "data"], path)
    assert job.failed == ["inference"]
    written = report.read(path)
    assert written["data"] == {"found": 2}
    assert written["sizes"]["image"] == [17, 22]
    assert "inference" not in written


def test_steps_of_a_network_and_a_variant_that_fails(monkeypatch):
    monkeypatch.setitem(workloads.VARIANTS, "broken", workloads.Variant({"compile": "unknown"}))
    job = tiny_job()
    numbers = sections.measure_steps(job, "dsen", ["this code", "broken"])
    assert list(numbers) == ["this code"]
    assert len(job.failed) == 1
    gflop = 3 * 2e-9 * 2 * 16 * 16 * model.build("dsen").macs_per_pixel()
    assert numbers["this code"]["tflops"] == pytest.approx(1e-3 * gflop / numbers["this code"]["median"])
    assert len(sections.step_rows("dsen, ", numbers, True)) == 1


def test_candidates_of_a_convolution_hold_it_and_begin_with_it():
    for channels, padded in convolutions.CANDIDATES.items():
        assert padded[0] == channels
        assert all(pair[0] >= channels[0] and pair[1] >= channels[1] for pair in padded)


@pytest.mark.parametrize("backward", [False, True])
def test_a_timed_convolution_has_channels_last_results(backward):
    use = convolutions.Use(torch.bfloat16, (2, 8, 9), backward)
    results = convolutions.make((4, 6), use, CPU)()
    shapes = [(2, 4, 8, 9), (6, 4, 5, 5), (6,)] if backward else [(2, 6, 8, 9)]
    assert [tuple(x.shape) for x in results] == shapes
    assert results[0].is_contiguous(memory_format=torch.channels_last)
    assert {x.dtype for x in results} == {torch.bfloat16}
    assert convolutions.nominal_flop((4, 6), use) == (6 if backward else 2) * 25 * 4 * 6 * 2 * 8 * 9


def test_rates_of_padded_convolutions_are_nominal():
    uses = {"forward": convolutions.Use(torch.bfloat16, (1, 8, 8))}
    numbers = convolutions.measure(CPU, uses, 1, {(4, 2): ((4, 2), (8, 8))})
    assert [row["padded"] for row in numbers] == [(4, 2), (8, 8)]
    for row in numbers:
        assert row["forward"]["tflops"] * row["forward"]["median"] == pytest.approx(1e-12 * 2 * 25 * 8 * 64)
    rows = convolutions.table_rows(json.loads(json.dumps(numbers)), uses)
    assert [len(row) for row in rows] == [2, 2]


def test_share_of_waiting_for_crops():
    numbers = sections.measure_data(tiny_job(), lambda: time.sleep(0.02), 3, images=2)
    assert list(numbers) == ["stored pairs", "synthetic rain"]
    for row in numbers.values():
        waiting, step = row["waiting"]["median"], row["step"]["median"]
        assert step >= 0.02
        assert row["waiting_share"] == pytest.approx(waiting / (waiting + step))
        assert row["making_share"] == pytest.approx(row["making"]["median"] / (waiting + step))


SETTINGS = resolve("sdsen_s2", {"batch_size": 4, "patch_size": 16})


@pytest.mark.parametrize("name", sorted({*workloads.variants_for(CPU)} - {"bf16, torch.compile", "reference"}))
def test_every_variant_does_the_same_step(name):
    losses = [workloads.make("training", variant, SETTINGS, CPU, (4, 16))() for variant in ("reference", name)]
    tolerance = 2e-3 if name.startswith("bf16") else 1e-2 if "bf16" in name else 1e-6
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    assert "bf16" not in name or losses[1] != losses[0]


def test_the_variant_without_a_compiler_has_no_library(monkeypatch):
    found = []
    monkeypatch.setattr(workloads, "train_step", lambda *_, **__: found.append(winograd.library()) or {"loss": 0.0})
    workloads.make("training", "float32 without a C++ compiler", SETTINGS, CPU, (4, 16))()
    assert found == [None]


def test_the_papers_training_is_projected_from_a_part_of_it():
    lines = ["run run: 130998 parameters on cpu in float32, steps 0 to 100"]
    for step, rate in ((50, 8.0), (100, 32.0)):  # the first steps and the first validation are slower: not projected
        lines.append(f"step {step}/100  loss 0.1  psnr 20.00 dB  lr 0.0005  {rate} images/s  waiting for data 0.1%")
        seconds = 150 / step
        lines.append(
            f"validation at step {step}: psnr by stage 19.10, 20.25 dB (input 18.00), ssim 0.7, {seconds:.1f} s"
        )
    numbers = trainings.project(lines, 64.5, 16)
    assert numbers == pytest.approx({"start": 10, "step": 0.5, "validation": 1.5, "whole": 10 + 20000 * 0.5 + 40 * 1.5})
    assert trainings.validation_psnr(lines) == {50: 20.25, 100: 20.25}


SMALL_DSEN = "--batch_size 2 -p dsen --channel 2 --depth 4 --patch_size 16 --val_images 1".split()


@pytest.mark.slow
def test_the_papers_training_is_stopped_after_a_part_of_it(tmp_path, data_dir):
    path = tmp_path / "numbers.json"
    trainings.main(
        ["run", "--device", "cpu", "--steps", "2", "--json", str(path), "--data_dir", str(data_dir), *SMALL_DSEN]
    )
    numbers = report.read(path)["paper"]
    assert all(numbers[name] > 0 for name in ("start", "step", "validation"))
    assert numbers["whole"] > 20000 * numbers["step"]


def test_a_training_that_fails_is_reported():
    command = [sys.executable, "-c", "print('why'); raise SystemExit(2)"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with pytest.raises(LostProcess, match="why"):
        trainings.finish(process)


@pytest.mark.slow
def test_float32_and_bf16_are_trained_alike_and_compared(tmp_path, data_dir):
    path = tmp_path / "numbers.json"
    trainings.main(
        ["curve", "--device", "cpu", "--steps", "2", "--json", str(path), "--data_dir", str(data_dir), *SMALL_DSEN]
    )
    numbers = report.read(path)["curve"]
    assert list(numbers["float32"]) == list(numbers["bf16"]) == ["1", "2"]
    assert numbers["end"] == pytest.approx(numbers["bf16"]["2"] - numbers["float32"]["2"])
    assert abs(numbers["end"]) <= numbers["largest"] < 0.1


@pytest.mark.slow
def test_what_16_bits_change_in_images(tmp_path):
    settings = resolve("sdsen_s2", {"model_dir": str(tmp_path), "channel": 2, "depth": 4})
    torch.manual_seed(0)
    checkpoints.save(tmp_path / "made.pth", checkpoints.Checkpoint(model.build(settings).state_dict(), 0, settings))
    places = {"model_dir": str(tmp_path), "device": "cpu", "data_dir": ""}
    rows = trainings.compare_outputs("made", places)
    assert len(rows) == 6
    assert all(0 < row["p999"] <= row["max"] < 1 for row in rows)
    assert trainings.compare_outputs("made", places, "bf16", images=2) == rows[:2]
    assert [row["max"] for row in trainings.compare_outputs("made", places, "float32", images=1)] == [0]
    with pytest.raises(UserError):
        trainings.compare_outputs("made", places, "int8")


def test_numbers_are_added_to_a_file(tmp_path):
    path = tmp_path / "numbers.json"
    report.add(path, {"a": 1, "b": {"c": 2}})
    report.add(path, {"b": {"d": 3}})
    assert report.read(path) == {"a": 1, "b": {"d": 3}}
    report.add(None, {"a": 2})


def cells(numbers):
    """The measured column of the targets."""
    return [line.split("|")[2].strip() for line in report.table(numbers).splitlines()[2:]]


def test_targets_with_and_without_numbers():
    peaks = {"this code": {"added": 3 * 2**20}, "reference": {"added": 9 * 2**20}}
    numbers = {
        "machine": {"device": "a GPU"},
        "sizes": {"image": [321, 481], "images": 16, "batch": 64, "patch": 64},
        "inference": {"this code": {"median": 0.0101}},
        "images": {"this code": {"median": 0.16}},
        "training": {"speedup": 7.5, "peaks": peaks},
        "steps": {"sdsen": {"eager": {"median": 0.085}, "compiled": {"median": 0.0787}}, "dsen": {}},
        "paper": {"whole": 960.0},
        "outputs": {"bf16": {"p999": 0.5}},
        "data": {"synthetic rain": {"waiting_share": 0.031}},
        "curve": {"end": -0.04, "largest": 0.2},
    }
    expected = [[85.0, 78.7], [7.5], [], [16.0], [10.1], [10.0], [0.5], [3, 9], [3.1], [-0.04, 0.2]]
    found = [[float(number) for number in re.findall(r"(?<![a-z\d])[-+]?\d[\d.]*", cell)] for cell in cells(numbers)]
    assert found == expected
    assert set(cells({})) == {report.MISSING}


def test_gpu_script_goes_on_where_every_part_fails(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$1" in *report.py) exec {sys.executable} "$@" ;; *) exit 3 ;; esac\n')
    python.chmod(0o755)
    environment = {**os.environ, "OUT": str(tmp_path)}
    command = ["bash", ROOT / "bench" / "gpu.sh", "cpu", python]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert sum(line.startswith("| ") and "| - |" in line for line in lines) == len(report.TARGETS)
    assert (tmp_path / "gpu.log").read_text() == done.stdout


@pytest.mark.slow
def test_ways_to_wait_are_measured_beside_busy_processes(tmp_path):
    path = tmp_path / "numbers.json"
    busy.main(["--rehearse", "--busy", "1", "--repeats", "2", "--json", str(path)])
    [numbers] = report.read(path).values()
    assert list(numbers) == ["here", "default"]
    for found in numbers.values():
        assert [len(found[task]["seconds"]) for task in busy.TASKS] == [2, 2]


def test_each_way_to_wait_has_its_variables_alone(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    kept = busy.environment("here")
    assert not kept.keys() & busy.VARIABLES
    assert busy.environment("GOMP_SPINCOUNT=7") == {**kept, "GOMP_SPINCOUNT": "7"}
    assert busy.environment("OMP_NUM_THREADS=1") == {**kept, "OMP_NUM_THREADS": "1"}
    assert busy.environment("default").keys() & busy.VARIABLES  # so that base/openmp.py does not choose


def test_a_worker_that_ends_is_reported():
    with pytest.raises(LostProcess), contextlib.ExitStack() as stack:
        busy.ask(busy.start(stack, "-c", "input()"), "training")


@pytest.mark.parametrize("arguments", [["--busy", "-1"], ["--repeats", "0"], ["--ways", "passive"]])
def test_ways_that_are_not_possible(arguments):
    with pytest.raises(BadArgument):
        busy.main(arguments)


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--repeats", "0"], ["--device", "tpu"], ["--what"]])
def test_arguments_that_are_not_possible(arguments):
    with pytest.raises(UserError):
        bench.main(arguments)

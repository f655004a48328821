"""Scores and seconds by stage."""

import json

import numpy as np
import pytest
import torch

import main
import model
from base.images import write_image
from conftest import make_pair
from paper import results, stages
from runs import checkpoints
from runs.checkpoints import Checkpoint
from settings import resolve


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A small checkpoint `b` of two stages, a data set, and results in a temporary folder."""
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    for index in range(2):
        write_image(tmp_path / "data" / "test" / f"{index}.png", np.hstack(make_pair(24, 32, index)))
    settings = resolve("sdsen_s2", {"channel": 2, "depth": 4, "run": "b", "data_dir": str(tmp_path / "data")})
    torch.manual_seed(0)
    checkpoints.save(tmp_path / "models/b/best.pth", Checkpoint(model.build(settings).state_dict(), 7, settings))
    return ["-m", "b", "--model_dir", str(tmp_path / "models"), "--device", "cpu"]


def test_stages_are_scored_as_in_a_test(words, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "seconds_by_stage", lambda *_: [0.5, 0.75])
    main.main(["-a", "stages", *words])
    result = json.loads((tmp_path / "results" / "stages_b.json").read_text())
    assert [(row["stage"], row["seconds"]) for row in result["stages"]] == [(0, 0), (1, 0.5), (2, 0.75)]
    assert (result["images"], result["step"], result["size"]) == (2, 7, "481x321")
    assert (result["run"], result["model"], result["data"]) == ("b", "b/best", "data")
    main.main(["-a", "test", "--log_dir", str(tmp_path / "log"), *words])
    lines = [line.split(",") for line in (tmp_path / "log" / "b" / "test_best.csv").read_text().splitlines()]
    for row, place in zip(result["stages"], ("input", "stage_1", "stage_2"), strict=True):
        values = [float(line[lines[0].index(f"psnr_{place}")]) for line in lines[1:]]
        assert row["psnr"] == pytest.approx(np.mean(values), abs=1e-4)


def test_seconds_are_the_median_of_stopping_at_each_stage(monkeypatch):
    """On a clock that only restoring moves: as many seconds as stages, and many more in the first turn."""
    now, calls = [0.0], []

    def restore(network, O, how, stage_num):
        calls.append(stage_num)
        now[0] += stage_num + (1000 if len(calls) <= 3 else 0)
        yield from [O] * stage_num

    monkeypatch.setattr(stages, "restore", restore)
    monkeypatch.setattr(stages.time, "perf_counter", lambda: now[0])
    settings = resolve("sdsen", {"stage_num": 3})
    assert stages.seconds_by_stage(model.build(settings), settings, torch.device("cpu")) == [1, 2, 3]
    assert calls == [1, 2, 3] * (1 + stages.REPEATS)

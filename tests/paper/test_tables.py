"""The rows of the paper's tables: their names, their runs, which can be stopped, and what is rendered of them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import main
from base.errors import UserError
from base.files import ROOT
from paper import packing, tables
from paper.tables import Row
from presets import PRESETS
from runs import checkpoints
from settings import FIELDS, Settings, resolve

TINY = {"steps": 4, "batch_size": 2, "patch_size": 16, "milestones": (3,), "lr": 1e-3}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Results go to a temporary folder, and the recipe `tiny` is known."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(tables.RECIPES, "tiny", TINY)
    return tmp_path / "results"


@pytest.fixture
def places(tmp_path, data_dir):
    folders = {"model_dir": tmp_path / "models", "log_dir": tmp_path / "log", "data_dir": data_dir}
    return [*(word for name, folder in folders.items() for word in (f"--{name}", str(folder))), "--device", "cpu"]


def call(*words):
    return main.main(["-a", "tables", *map(str, words)])


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("dsen_rain800", Row("dsen", "rain800")),
        ("dsen_wo_se_rain100h_short", Row("dsen_wo_se", "rain100h", "short")),
        ("sdsen_s2_rain800_seed3", Row("sdsen_s2", "rain800", seed=3)),
        ("cnn_c4da_rain800_short_seed12", Row("cnn_c4da", "rain800", "short", 12)),
    ],
)
def test_names_of_rows(name, row):
    assert row.name == name
    assert tables.find_row(name) == row


@pytest.mark.parametrize("name", ["dsen", "nothing_rain800", "dsen_rain12", "dsen_rain800_long", "dsen_rain800_seed"])
def test_no_such_row(name):
    with pytest.raises(UserError, match=f"no row is called '{name}'.*dsen_rain800"):
        tables.find_row(name)


def test_the_papers_recipe_is_the_defaults():
    """Adam 5e-4, divided by 10 at 15000 and 17500 of 20000, batch 64 of 64x64, squared error, no augmentation."""
    for row in tables.all_rows():
        if row.preset not in tables.PAPER:
            continue
        settings = row.settings({})
        assert (settings.lr, settings.milestones, settings.steps) == (5e-4, (15000, 17500), 20000)
        assert (settings.batch_size, settings.patch_size, settings.loss, settings.clip_norm) == (64, 64, "mse", 0.0)
        assert settings.aug_data == {"cnn_da": "rotate", "cnn_c4da": "quarter_turns"}.get(row.preset, "none")
        assert settings.data_dir == str(ROOT / "data" / row.data)


def test_every_preset_of_the_tables_has_its_row_on_both_sets():
    presets = {preset for presets in tables.TABLES.values() for preset in presets}
    assert presets == {*tables.PAPER, "coarse2fine", "php"}
    assert set(tables.PAPER) == {name for name, preset in PRESETS.items() if "network" not in preset.differences}
    assert len({row.name for row in tables.all_rows()}) == 2 * len(presets)
    assert set(tables.RECIPE) | set(tables.PLACES) <= set(FIELDS)


def test_a_row_is_trained_tested_and_written_once(results, places, tmp_path, capsys):
    assert call("--run", "cnn_rain800_tiny", *places) == 0
    result = json.loads((results / "cnn_rain800_tiny.json").read_text())
    state = checkpoints.load(tmp_path / "models" / "cnn_rain800_tiny" / "latest.pth")
    assert (result["steps"], result["preset"], result["recipe"], result["test_images"]) == (4, "cnn", "tiny", 2)
    assert result["seconds"] == round(state.seconds, 1) > 0
    assert result["device"].startswith("cpu, ")
    assert result["train_rain"] == "as in the data set"
    assert set(result["settings"]) == set(FIELDS)
    assert result["tested"] == "best"
    assert str(tmp_path) not in json.dumps(result)  # where things lie is nobody else's business
    assert result["settings"]["model_dir"] == "models"
    assert list(result["test"]) == ["input", "stage_1"]
    assert [point[0] for point in result["validation"]] == [4]
    assert result["validation"][0][1] == pytest.approx(state.best_psnr, abs=0.005)
    out = capsys.readouterr().out
    psnr, ssim = result["test"]["stage_1"]["psnr"], result["test"]["stage_1"]["ssim"]
    assert f"{psnr:.2f} dB / {ssim:.4f} after 4 steps" in out

    main.main(["-a", "test", "-m", "cnn_rain800_tiny", *places])
    assert f"{psnr:.4f}" in capsys.readouterr().out

    assert call("--run", "cnn_rain800_tiny", *places) == 0
    assert "has its result already" in capsys.readouterr().out
    assert call("--run", "cnn_rain800_tiny", "--steps", 5, *places) == 0  # more steps are missing
    assert json.loads((results / "cnn_rain800_tiny.json").read_text())["steps"] == 5


def test_a_row_of_the_papers_recipe_tests_the_last_step(results, places, tmp_path):
    """The best checkpoint is made another one here, which would have other scores."""
    small = ["--steps", 2, "--batch_size", 2, "--patch_size", 16]
    assert call("--run", "cnn_rain800", *places, *small) == 0
    result = json.loads((results / "cnn_rain800.json").read_text())
    assert result["tested"] == "latest"
    assert [path.name for path in (tmp_path / "log" / "cnn_rain800").glob("*.csv")] == ["test_latest.csv"]
    (results / "cnn_rain800.json").write_text(json.dumps({**result, "tested": "best"}))
    best = tmp_path / "models" / "cnn_rain800" / "best.pth"
    state = checkpoints.load(best)
    state.network = {name: 0 * weight for name, weight in state.network.items()}
    checkpoints.save(best, state)
    assert call("--run", "cnn_rain800", *places, *small) == 0  # a result of the best one is none of this row
    assert json.loads((results / "cnn_rain800.json").read_text()) == result


def test_rows_are_listed_with_their_state(results, places, capsys):
    call("--run", "dsen_rain800_tiny", *places)
    call("--run", "cnn_rain800", *places, "--steps", 1, "--batch_size", 2, "--patch_size", 16)
    (results / "cnn_rain800.json").unlink()
    capsys.readouterr()
    call(*places, "--batch_size", 2, "--patch_size", 16)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["dsen_rain100h"].endswith("23.60 / 0.7618  no run")
    assert lines["cnn_rain800"].endswith("step 1 of 20000")
    assert lines["dsen_rain800_tiny"].endswith("after 4 steps")


def test_a_run_that_was_begun_in_another_way_is_not_gone_on_with(results, places):
    call("--run", "cnn_rain800", *places, "--steps", 1, "--batch_size", 2, "--patch_size", 16)
    with pytest.raises(UserError, match="was begun with patch_size 16, and cnn_rain800 has 64: move that run away"):
        call("--run", "cnn_rain800", *places, "--batch_size", 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run", "nothing"], "no row is called 'nothing'"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--run", "cnn_rain800", "--stage_num", "3"], "--stage_num is the row's own"),
        (["--stepz", "3"], "unknown setting --stepz; the nearest is --steps"),
    ],
)
def test_wrong_calls(results, words, message):
    with pytest.raises(UserError, match=message):
        call(*words)


def test_a_failed_training_is_told_and_the_others_go_on(results, places, tmp_path, capsys):
    spoilt = tmp_path / "models" / "dsen_rain800_tiny" / "latest.pth"
    assert call("--run", "cnn_rain800_tiny", *places, "--steps", 1) == 0
    spoilt.parent.mkdir()
    (tmp_path / "models" / "cnn_rain800_tiny" / "latest.pth").rename(spoilt)  # another network's
    assert call("--run", "dsen_rain800_tiny", "cnn_rain800_tiny", *places) == 1
    out = capsys.readouterr().out
    assert "dsen_rain800_tiny: train ended with 'error: " in out
    assert (results / "cnn_rain800_tiny.json").is_file()


def start(places, tmp_path, *words):
    """Two rows at once, in a process whose results go to tmp_path/results and whose archive is always current."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import main; "
        "from paper import packing, tables; from base.console import run_script; "
        "tables.RESULTS = Path(sys.argv[2]); packing.SECONDS = 0; "
        "sys.argv[1:] = sys.argv[3:]; run_script(main.main)"
    )
    rows = ["-a", "tables", "--run", "cnn_rain800", "dsen_rain800", "--jobs", "2", "--patch_size", "16"]
    more = ["--batch_size", "2", "--save_minutes", "0", *places, *words]
    command = [sys.executable, "-c", code, str(ROOT / "config"), str(tmp_path / "results"), *rows, *more]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, **streams, start_new_session=True)


@pytest.mark.parametrize("name", ["time", signal.SIGTERM, signal.SIGINT])
def test_runs_stop_in_time_and_go_on(places, tmp_path, name):
    process = start(places, tmp_path, *(["--minutes", "0.2"] if name == "time" else []))
    paths = [tmp_path / "models" / row / "latest.pth" for row in ("cnn_rain800", "dsen_rain800")]
    end = time.monotonic() + 60
    while name != "time" and not all(path.exists() for path in paths) and time.monotonic() < end:
        time.sleep(0.1)
    if name != "time":
        process.send_signal(name)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 1, output
    steps = {path.parent.name: checkpoints.load(path).step for path in paths}
    for row, step in steps.items():
        assert step > 0
        assert f"{row}: stopped at step {step} of 20000" in output
    process = start(places, tmp_path, "--steps", str(max(steps.values()) + 2))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    for row, step in steps.items():
        assert f"{row}: from step {step} to {max(steps.values()) + 2}" in output
        assert json.loads((tmp_path / "results" / f"{row}.json").read_text())["steps"] == max(steps.values()) + 2


def packed_steps(archive):
    find = tables.find_run({})
    contents = packing.read(archive, find) if archive.is_file() else {}
    return {name: packing.packed_state(find(name), files, archive).step for name, files in contents.items()}


def test_rows_that_were_killed_are_finished_elsewhere_as_if_unbroken(
    results, places, data_dir, tmp_path, monkeypatch, capsys
):
    """SIGKILL in the middle of the steps; the archive goes on in other folders, with the same weights at the end."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    archive = tmp_path / "runs.zip"
    process = start(places, tmp_path, "--pack", archive)
    end = time.monotonic() + 90
    while (len(packed_steps(archive)) < 2 or min(packed_steps(archive).values()) < 3) and time.monotonic() < end:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    steps = packed_steps(archive)
    assert steps.keys() == {"cnn_rain800", "dsen_rain800"}

    states = {}
    last = ["--run", "cnn_rain800", "--steps", steps["cnn_rain800"] + 2]
    small = ["--batch_size", 2, "--patch_size", 16, "--data_dir", data_dir, "--device", "cpu"]
    for place in ("elsewhere", "unbroken"):
        here = ["--model_dir", tmp_path / place / "models", "--log_dir", tmp_path / place / "log", *small]
        if place == "elsewhere":
            assert call("--take", archive, *here) == 0
            capsys.readouterr()
            call(*here)
            listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
            for row, step in steps.items():
                assert listed[row].endswith(f"step {step} of 20000")
        assert call(*last, *here) == 0
        states[place] = checkpoints.load(tmp_path / place / "models" / "cnn_rain800" / "latest.pth")
        (results / "cnn_rain800.json").unlink()
        assert (tmp_path / place / "log" / "cnn_rain800" / "train.log").is_file()
    resumed, whole = states["elsewhere"], states["unbroken"]
    assert resumed.step == whole.step == steps["cnn_rain800"] + 2
    assert (
        f"resumes at step {steps['cnn_rain800']} of"
        in (tmp_path / "elsewhere" / "log" / "cnn_rain800" / "tables.log").read_text()
    )
    assert all(torch.equal(resumed.network[name], weight) for name, weight in whole.network.items())
    moments = [state.optimizer["state"] for state in (resumed, whole)]
    assert all(torch.equal(moments[0][k][name], value) for k, v in moments[1].items() for name, value in v.items())


def test_without_rows_all_runs_are_packed(results, places, tmp_path):
    archive = tmp_path / "runs.zip"
    with pytest.raises(UserError):
        call("--pack", archive, *places)
    assert call("--run", "cnn_rain800_tiny", *places, "--steps", 1, "--pack", archive) == 0
    assert packed_steps(archive) == {"cnn_rain800_tiny": 1}
    other = tmp_path / "other.zip"
    assert call("--pack", other, *places) == 0
    assert packed_steps(other) == {"cnn_rain800_tiny": 1}


# ---------------------------------------------------------------- rendering


def make_result(row, **changes):
    """A result as `write_result` makes it."""
    settings = {**json.loads(json.dumps(vars(row.settings({})))), **changes.pop("settings", {})}
    stages = row.settings({}).stage_num
    scores = {
        f"stage_{t}": {"psnr": 20.0 + t, "ssim": 0.8, "psnr_y": 22.0, "ssim_y": 0.9} for t in range(1, stages + 1)
    }
    values = {
        "steps": 20000,
        "tested": row.tested,
        "test": scores,
        "test_images": 100,
        "train_rain": "as in the data set",
    }
    return {**row._asdict(), **values, "settings": settings, **changes}


def write(results, row, **changes):
    results.mkdir(exist_ok=True)
    (results / f"{row.name}.json").write_text(json.dumps(make_result(row, **changes)))


def rows_of(text, name):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if f"`{name}`" in line]


def test_only_a_full_run_of_the_papers_recipe_stands_as_one(results):
    write(results, Row("dsen", "rain800"))
    write(results, Row("sdsen", "rain800"), steps=4000)
    write(results, Row("cnn", "rain800"), settings={"batch_size": 8})
    write(results, Row("cnn", "rain100h", "short"), steps=2000, settings={"batch_size": 8, "steps": 2000})
    write(results, Row("mcnn", "rain800"), tested="best")
    text = tables.markdown()
    (cells, again, *_) = rows_of(text, "dsen_rain800")  # in several tables
    assert cells == again
    assert cells[2:6] == ["21.00", "0.8000", "23.39 / 0.8162", "20000 x 64"]
    assert rows_of(text, "sdsen_rain800")[0][2:6] == [
        "28.00",
        "0.8000",
        "23.64 / 0.8379",
        "*4000 x 64: no reproduction*",
    ]
    assert rows_of(text, "cnn_rain800")[0][5] == "*20000 x 8: no reproduction*"
    assert rows_of(text, "cnn_rain100h_short")[0][5] == "*2000 x 8: no reproduction*"
    assert rows_of(text, "mcnn_rain800")[0][5] == "*20000 x 64: no reproduction*"
    assert rows_of(text, "mcnn_rain100h") == [
        ["MCNN", "Rain100H", "no run yet", "", "23.70 / 0.7226", "", "", "", "`mcnn_rain100h`"]
    ]


NAMES = (  # with a result in the test below
    *("dsen_rain800", "dsen_rain800_seed1", "dsen_rain800_short", "cnn_rain800", "cnn_rain800_short"),
    *("php_rain800_short", "cnn_rain100h", "cnn_rain100h_short"),
)


def test_the_readme_has_shorter_runs_only_where_a_row_has_no_full_one(results):
    short = {"steps": 2000, "settings": {"batch_size": 8, "steps": 2000}}
    for row in (Row("dsen", "rain800"), Row("dsen", "rain800", seed=1), Row("cnn", "rain800")):
        write(results, row)
    for row in (Row("dsen", "rain800", "short"), Row("cnn", "rain800", "short"), Row("php", "rain800", "short")):
        write(results, row, **short)
    write(results, Row("cnn", "rain100h"), steps=4000)
    write(results, Row("cnn", "rain100h", "short"), **short)
    readme, page = tables.markdown(in_full=False), tables.markdown(in_full=True)
    parts = {title: readme.split(f"**{title}**")[1].split("**")[0] for title in tables.TABLES if title in readme}
    assert list(parts) == ["Table 1", "Table 2", "Table 4", "Other networks"]
    shown = {title: {name for name in NAMES if rows_of(text, name)} for title, text in parts.items()}
    full = {"dsen_rain800", "dsen_rain800_seed1"}
    assert shown["Table 1"] == {*full, "cnn_rain800", "cnn_rain100h", "cnn_rain100h_short"}
    assert shown["Table 4"] == full
    assert shown["Other networks"] == {*full, "dsen_rain800_short", "php_rain800_short"}  # these can be compared
    assert all(rows_of(page, name) for name in (*NAMES, "mcnn_rain800", "sdsen_rain100h"))


@pytest.fixture
def pages(results, tmp_path, monkeypatch):
    """A README and a page of results with old tables between their marks."""
    texts = {"README": tmp_path / "README.md", "PAGE": tmp_path / "page.md"}
    for name, path in texts.items():
        path.write_text(f"before {name}\n{tables.BEGIN}old\n{tables.END}after {name}\n")
        monkeypatch.setattr(tables, name, path)
    write(results, Row("dsen", "rain800"))
    return texts


def test_readme_and_page_change_between_their_marks_alone(pages):
    assert call("--write") == 0
    texts = {name: path.read_text() for name, path in pages.items()}
    for name, text in texts.items():
        assert text.startswith(f"before {name}\n{tables.BEGIN}")
        assert text.endswith(f"{tables.END}after {name}\n")
        assert tables.markdown(in_full=name == "PAGE") in text
        assert "old" not in text
    assert call("--write") == 0
    assert {name: path.read_text() for name, path in pages.items()} == texts


@pytest.mark.parametrize("name", ["README", "PAGE"])
@pytest.mark.parametrize("spoilt", ["no marks", None])
def test_without_marks_nothing_is_written(pages, name, spoilt):
    if spoilt:
        pages[name].write_text(spoilt)
    else:
        pages[name].unlink()
    before = {path: path.read_text() for path in pages.values() if path.is_file()}
    with pytest.raises(UserError):
        call("--write")
    assert {path: path.read_text() for path in pages.values() if path.is_file()} == before


@pytest.mark.parametrize(("path", "in_full"), [("README.md", False), ("results/README.md", True)])
def test_readme_and_page_hold_what_the_results_say(path, in_full):
    text = (ROOT / path).read_text()
    assert text.count(tables.BEGIN) == 1
    between = text.split(tables.BEGIN)[1].split(tables.END)[0]
    assert between == f"\n{tables.markdown(in_full)}\n"


def test_help_is_that_of_the_tables(capsys):
    with pytest.raises(SystemExit) as ended:
        call("--help")
    assert not ended.value.code
    assert {"--run", "--jobs", "--minutes", "--pack", "--take", "--write"} <= set(capsys.readouterr().out.split())


def test_validation_curve_takes_the_last_of_a_step():
    line = "2026 validation at step {}: psnr by stage {} dB (input 20.00), ssim {}, 3.0 s"
    text = "\n".join(
        line.format(*values) for values in ((500, "20.00, 21.50", 0.7), (1000, "22.25", 0.75), (500, "21.00", 0.71))
    )
    assert tables.validation_curve(text) == [[500, 21.0, 0.71], [1000, 22.25, 0.75]]


def test_defaults_are_full_rows():
    assert Settings().steps == resolve("sdsen").steps == 20000

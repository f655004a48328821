"""Result files: collected from what a training and a test leave; what is rendered of them, and where."""

import json

import pytest

import main
from base.errors import DamagedFile
from base.files import ROOT
from paper import tables
from paper.rows import Row, find_run
from runs import checkpoints
from runs.checkpoints import Checkpoint
from settings import FIELDS


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FOLDER", tmp_path / "results")
    return tables.FOLDER


LINE = "2026 validation at step {}: psnr by stage {} dB (input 20.00), ssim {}, 3.0 s\n"


@pytest.fixture
def run(tmp_path):
    """A run of two stages that was trained and tested on two images, of which one is too small for SSIM."""
    folders = {name: str(tmp_path / name) for name in ("model_dir", "log_dir", "data_dir")}
    run = find_run(Row("sdsen_s2", "rain800", "short"), folders)
    checkpoints.save(run.file("latest.pth"), Checkpoint({}, 2000, run.settings, seconds=12.34, device="a device"))
    run.settings.log_path.mkdir(parents=True)
    (run.settings.log_path / "train.log").write_text(LINE.format(500, "20.00, 21.50", 0.7))
    columns = [
        f"{m}_{place}" for place in ("input", "stage_1", "stage_2") for m in ("psnr", "ssim", "psnr_y", "ssim_y")
    ]
    lines = [["a.png", *range(10, 22)], ["b.png", *(value + 2 if value % 2 == 0 else "nan" for value in range(10, 22))]]
    text = "\n".join(",".join(map(str, line)) for line in [["image", *columns], *lines])
    (run.settings.log_path / "test_best.csv").write_text(text + "\n")
    return run


def test_a_result_has_each_stages_own_scores(run):
    assert tables.collect(run)["test"] == {
        "input": {"psnr": 11, "ssim": 11, "psnr_y": 13, "ssim_y": 13},
        "stage_1": {"psnr": 15, "ssim": 15, "psnr_y": 17, "ssim_y": 17},
        "stage_2": {"psnr": 19, "ssim": 19, "psnr_y": 21, "ssim_y": 21},
    }


def test_a_result_says_what_was_trained_and_nothing_of_the_machines_folders(run, tmp_path):
    result = tables.collect(run)
    assert (result["preset"], result["data"], result["recipe"], result["seed"]) == ("sdsen_s2", "rain800", "short", 0)
    assert (result["steps"], result["tested"], result["seconds"], result["device"]) == (2000, "best", 12.3, "a device")
    assert (result["test_images"], result["validation"]) == (2, [[500, 21.5, 0.7]])
    assert set(result["settings"]) == set(FIELDS)
    assert result["settings"]["model_dir"] == "model_dir"
    assert str(tmp_path) not in json.dumps(result)


def test_rain_of_the_training_pairs(run, tmp_path):
    assert tables.collect(run)["train_rain"] == "as in the data set"
    (tmp_path / "data_dir" / "train").mkdir(parents=True)
    for start in ("drawn", "synthetic rain"):
        text = f"{start}: rain100l, 6 on each of 209 images, seed 0\n"
        (tmp_path / "data_dir" / "train" / "drawn.txt").write_text(text)
        assert tables.collect(run)["train_rain"] == "synthetic: rain100l, 6 on each of 209 images, seed 0"
    run = run._replace(settings=find_run(run.row, {**vars(run.settings), "rain": "rain800"}).settings)
    assert tables.collect(run)["train_rain"] == "synthetic: rain800"


def test_validation_curve_takes_the_last_of_a_step():
    lines = (500, "20.00, 21.50", 0.7), (1000, "22.25", 0.75), (500, "21.00", 0.71)
    text = "".join(LINE.format(*values) for values in lines)
    assert tables.validation_curve(text) == [[500, 21.0, 0.71], [1000, 22.25, 0.75]]


def test_files_of_results(folder):
    assert tables.read_results() == {}
    tables.write_result("b", {"x": 1})
    assert tables.write_result("a", {"x": 2}) == folder / "a.json"
    assert list(tables.read_results().items()) == [("a", {"x": 2}), ("b", {"x": 1})]
    (folder / "a.json").write_text("{")
    with pytest.raises(DamagedFile):
        tables.read_results()


# ---------------------------------------------------------------- tables


def write(row, psnr=21.0, **changes):
    """A result as `tables.collect` makes it."""
    settings = find_run(row, {}).settings
    result = {
        **row._asdict(),
        "steps": settings.steps,
        "tested": row.checkpoint,
        "test": {"input": {"psnr": 1.0, "ssim": 0.1}, "stage_1": {"psnr": psnr, "ssim": 0.8}},
        "test_images": 100,
        "train_rain": "as in the data set",
        **changes,
        "settings": {**json.loads(json.dumps(vars(settings))), **changes.get("settings", {})},
    }
    tables.write_result(row.name, result)


def lines_of(text, name):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if f"`{name}`" in line]


NOT_FULL = {  # rows that reproduce nothing: why, and how many steps of how many crops
    Row("sdsen", "rain800"): ({"steps": 4000}, "4000 x 64"),
    Row("cnn", "rain800"): ({"settings": {"batch_size": 8}}, "20000 x 8"),
    Row("cnn", "rain100h", "short"): ({}, "2000 x 8"),
    Row("mcnn", "rain800"): ({"tested": "best"}, "20000 x 64"),
    Row("dsen_wo_se", "rain800"): ({"settings": {"aug_data": "flip"}}, "20000 x 64"),
}


def test_only_a_full_run_of_the_papers_recipe_stands_as_one():
    write(Row("dsen", "rain800"))
    for row, (changes, _) in NOT_FULL.items():
        write(row, **changes)
    text = tables.full()
    cells, again, *_ = lines_of(text, "dsen_rain800")  # in several tables
    assert cells == again
    assert cells[2:6] == ["21.00", "0.8000", "23.39 / 0.8162", "20000 x 64"]
    for row, (_, steps) in NOT_FULL.items():
        assert lines_of(text, row.name)[0][5] == f"*{steps}: no reproduction*"
    assert len(tables.compact().splitlines()) == 3


def test_rows_without_a_run_are_shown_with_the_papers_scores():
    assert lines_of(tables.full(), "mcnn_rain100h") == [
        ["MCNN", "Rain100H", "no run yet", "", "23.70 / 0.7226", "", "", "", "`mcnn_rain100h`"]
    ]


def test_the_compact_table_has_each_full_run_once():
    for row in (Row("dsen", "rain800"), Row("dsen", "rain100h"), Row("dsen", "rain800", "short")):
        write(row)
    write(Row("dsen", "rain800", seed=1), psnr=22.0)
    assert tables.compact().splitlines() == [
        "| row | data | here: PSNR / SSIM | in the paper |",
        "|---|---|---|---|",
        "| DSEN | Zhang800 | 21.00 / 0.8000 | 23.39 / 0.8162 |",
        "| DSEN, seed 1 | Zhang800 | 22.00 / 0.8000 | 23.39 / 0.8162 |",
        "| DSEN | Rain100H | 21.00 / 0.8000 | 23.60 / 0.7618 |",
    ]


def test_the_tilt_study_is_shown():
    psnr = {"rainy input": [20.0, 21.0], "dsen": [22.0, 25.0]}
    runs = {"dsen": {"steps": 7, "batch_size": 2, "data": "rain800", "rain": ""}}
    tables.write_result("tilt", {"rain": "rain800", "images": 2, "angles": [-15, 0], "psnr": psnr, "runs": runs})
    assert tables.full().splitlines()[-6:-2] == [
        "| PSNR at | -15° | 0° | worst less 0° |",
        "|---|---|---|---|",
        "| rainy input | 20.00 | 21.00 | -1.00 |",
        "| dsen | 22.00 | 25.00 | -3.00 |",
    ]


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A README and a page of results with old tables between their marks."""
    texts = {"README": tmp_path / "README.md", "PAGE": tmp_path / "page.md"}
    for name, path in texts.items():
        path.write_text(f"before {name}\n{tables.START}old\n{tables.END}after {name}\n")
        monkeypatch.setattr(tables, name, path)
    write(Row("dsen", "rain800"))
    return texts


def test_readme_and_page_change_between_their_marks_alone(pages):
    for _ in range(2):
        assert main.main(["-a", "tables", "--write"]) == 0
        for name, between in (("README", tables.compact()), ("PAGE", tables.full())):
            expected = f"before {name}\n{tables.START}\n{between}\n\n{tables.END}after {name}\n"
            assert pages[name].read_text() == expected


@pytest.mark.parametrize("name", ["README", "PAGE"])
@pytest.mark.parametrize("text", ["no marks", None])
def test_a_page_without_marks_is_not_written(pages, name, text):
    pages[name].unlink()
    if text:
        pages[name].write_text(text)
    with pytest.raises(DamagedFile):
        tables.write_tables()
    assert (pages[name].read_text() if pages[name].is_file() else None) == text


@pytest.mark.parametrize(("path", "render"), [("README.md", tables.compact), ("docs/RESULTS.md", tables.full)])
def test_readme_and_page_hold_what_the_results_say(monkeypatch, path, render):
    monkeypatch.setattr(tables, "FOLDER", ROOT / "results")
    text = (ROOT / path).read_text()
    assert text.count(tables.START) == 1
    assert text.split(tables.START)[1].split(tables.END)[0] == f"\n{render()}\n\n"

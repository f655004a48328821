"""What is rendered of the results, and where."""

import json

import pytest

import main
from base.errors import DamagedFile
from base.files import ROOT
from paper import results, stages, tables, tilt
from paper.rows import Row, find_run


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")


def write(row, psnr=21.0, **changes):
    """A result as `results.collect` makes it."""
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
    results.write_result(row.name, result)


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


def test_studies_are_shown_in_full():
    psnr = {"rainy input": [20.0, 21.0], "dsen": [22.0, 25.0]}
    runs = {"dsen": {"steps": 7, "batch_size": 2, "data": "rain800", "rain": ""}}
    tilted = {"rain": "rain800", "images": 2, "angles": [-15, 0], "psnr": psnr, "runs": runs}
    assert tilt.columns_and_rows(tilted)[1][1] == ["dsen", "22.00", "25.00", "-3.00"]
    scores = {"psnr": 20.0, "ssim": 0.5, "psnr_y": 21.0, "ssim_y": 0.6}
    rows = [{"stage": t, "seconds": 0.5 * t, **scores} for t in (0, 1)]
    facts = {"run": "b", "model": "b/best", "step": 7, "data": "rain800", "images": 4, "device": "cpu", "size": "9x8"}
    staged = {**facts, "stages": rows}
    assert stages.columns_and_rows(staged)[1][1] == [1, "20.00", "0.5000", "21.00", "0.6000", "0.50"]
    results.write_result("tilt", tilted)
    results.write_result("stages_b", staged)
    for part in (tilt.columns_and_rows(tilted), stages.columns_and_rows(staged)):
        assert tables.table(*part) in tables.full()


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
def test_without_marks_nothing_is_written(pages, name, text):
    pages[name].unlink()
    if text:
        pages[name].write_text(text)
    before = {path: path.read_text() for path in pages.values() if path.is_file()}
    with pytest.raises(DamagedFile):
        tables.write_tables()
    assert {path: path.read_text() for path in pages.values() if path.is_file()} == before


@pytest.mark.parametrize(("path", "render"), [("README.md", tables.compact), ("docs/RESULTS.md", tables.full)])
def test_readme_and_page_hold_what_the_results_say(monkeypatch, path, render):
    monkeypatch.setattr(results, "FOLDER", ROOT / "results")
    text = (ROOT / path).read_text()
    assert text.count(tables.START) == 1
    assert text.split(tables.START)[1].split(tables.END)[0] == f"\n{render()}\n\n"

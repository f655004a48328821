"""The rows of the paper's tables: names, settings, and the run of each."""

import pytest

from base.errors import BadArgument, Mismatch
from base.files import ROOT
from paper import rows
from paper.rows import Row
from presets import PRESETS
from runs import checkpoints
from runs.checkpoints import Checkpoint
from settings import FIELDS, Settings


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
    assert rows.find_row(name) == row


@pytest.mark.parametrize(
    "name", ["dsen", "nothing_rain800", "dsen_rain12", "dsen_rain800_long", "dsen_rain800_seed", "dsen_rain800_seed0"]
)
def test_no_such_row(name):
    assert rows.parse_name(name) is None
    with pytest.raises(BadArgument):
        rows.find_row(name)


def test_the_papers_recipe_is_the_defaults():
    """Adam 5e-4, divided by 10 at 15000 and 17500 of 20000, batch 64 of 64x64, squared error, no augmentation."""
    assert Settings().steps == 20000
    for row in rows.all_rows():
        if row.preset in rows.PAPER:
            settings = rows.find_run(row, {}).settings
            assert (settings.lr, settings.milestones, settings.steps) == (5e-4, (15000, 17500), 20000)
            assert (settings.batch_size, settings.patch_size, settings.loss, settings.clip_norm) == (64, 64, "mse", 0.0)
            assert settings.aug_data == {"cnn_da": "rotate", "cnn_c4da": "quarter_turns"}.get(row.preset, "none")
            assert settings.data_dir == str(ROOT / "data" / row.data)


def test_every_preset_of_the_tables_has_its_row_on_both_sets():
    presets = {preset for presets in rows.TABLES.values() for preset in presets}
    assert presets == {*rows.PAPER, "coarse2fine", "php"}
    assert set(rows.PAPER) == {name for name, preset in PRESETS.items() if "network" not in preset.differences}
    assert len({row.name for row in rows.all_rows()}) == 2 * len(presets)
    assert set(rows.RECIPE_FIELDS) <= set(FIELDS)


def test_the_scores_in_the_paper_are_those_of_the_data_set():
    assert Row("sdsen", "rain100h").paper_scores == "27.16 / 0.8589"
    assert Row("sdsen", "rain800").paper_scores == "23.64 / 0.8379"
    assert Row("php", "rain800").paper_scores == "-"


def test_a_run_of_another_recipe_is_not_resumed(tmp_path):
    run = rows.find_run(Row("cnn", "rain800"), {"model_dir": str(tmp_path)})
    assert run.step == 0
    checkpoints.save(run.file("latest.pth"), Checkpoint({}, 7, run.settings))
    assert run.step == 7
    with pytest.raises(Mismatch, match="batch_size"):
        _ = rows.find_run(run.row, {"model_dir": str(tmp_path), "batch_size": 2}).step

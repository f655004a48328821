"""Settings: the order of defaults, preset and overrides, what is refused, and what checkpoints store."""

from pathlib import Path

import pytest

import losses
import model
import settings as settings_module
from base.errors import BadArgument
from base.files import ROOT
from base.options import make_parser
from presets import PRESETS
from settings import (
    FIELDS,
    NETWORK_FIELDS,
    Settings,
    from_dict,
    override,
    read_overrides,
    resolve,
    to_dict,
)
from synthesis.styles import STYLES


def test_defaults_are_the_papers():
    settings = resolve()
    assert (settings.channel, settings.depth, settings.stage_num, settings.link) == (10, 7, 8, "concat")
    assert (settings.batch_size, settings.patch_size, settings.lr, settings.steps) == (64, 64, 5e-4, 20000)
    assert (settings.milestones, settings.loss, settings.aug_data) == ((15000, 17500), "mse", "none")


def test_defaults_then_preset_then_overrides():
    assert resolve("dsen").stage_num == 1
    assert resolve("cnn", {"channel": 6}).channel == 6
    assert resolve("cnn").channel == 20
    assert resolve("cnn").run == "cnn"
    assert resolve("cnn", {"run": "mine"}).model_path == ROOT / "models" / "mine"


def test_default_paths_start_at_the_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert resolve().log_dir == str(ROOT / "logdir")
    assert resolve().data_dir == ""


def test_typed_paths_start_at_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert read_overrides(["--data_dir", "here/../there"]) == {"data_dir": str(tmp_path / "there")}


def test_overrides_are_typed():
    words = "--lr 1e-3 --steps 7 --use_se false --milestones 3 5 --run=a=b --log_level debug".split()
    assert read_overrides(words) == {
        "lr": 1e-3,
        "steps": 7,
        "use_se": False,
        "milestones": (3, 5),
        "run": "a=b",
        "log_level": "debug",
    }
    assert read_overrides(["--milestones"]) == {"milestones": ()}
    assert read_overrides("--more_data a /b --exclude=".split()) == {
        "more_data": (str(Path.cwd() / "a"), "/b"),
        "exclude": (),
    }
    assert read_overrides("--lr 1 --steps 2 --lr 3".split()) == {"lr": 3.0, "steps": 2}


@pytest.mark.parametrize(
    "words",
    [
        ["--steps", "1.5"],
        ["--steps"],
        ["--steps", ""],
        ["--use_se", "maybe"],
        ["--lr", "1", "2"],
        ["--milestones", "x"],
        ["word"],
        ["--log_level", "chatty"],
        ["--batch_size", "0"],
        ["--model_dir", ""],
        ["--log_dir="],
        ["--show_dir"],
    ],
)
def test_words_that_are_refused(words):
    with pytest.raises(BadArgument):
        read_overrides(words)


@pytest.mark.parametrize(
    "values",
    [
        {"chanel": 3},
        {"channel": "3"},
        {"channel": True},
        {"batch_size": 0},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"link": "concatenate"},
        {"milestones": (5, 3)},
        {"milestones": (0, 3)},
        {"milestones": (-5, 3)},
        {"run": "a\nb"},
        {"milestones": ("3",)},
        {"depth": 3},
        {"more_data": "folder"},
        {"more_data": (3,)},
        {"group": "z2", "aggregation": "max"},
        {"loss": "ssim", "patch_size": 10},
        {"loss": "php"},
        {"run": "../out"},
        {"run": ".."},
        {"rain": "snow"},
        {"clean_dir": "photographs"},
        {"average": 1.0},
        {"run": "x" * 300},
        {"run": "a\0b"},
        {"channel": 10**6},
        {"seed": 2**64},
    ],
)
def test_values_that_are_refused(values):
    with pytest.raises(BadArgument):
        override(Settings(), values)


def test_an_empty_run_is_the_presets_name():
    assert read_overrides(["--run", "", "--data_dir", ""]) == {"data_dir": ""}


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        (lambda: read_overrides(["--chanel", "3"]), "--channel"),
        (lambda: override(Settings(), {"chanel": 3}), "--channel"),
        (lambda: override(Settings(), {"link": "concatenate"}), "concat"),
        (lambda: resolve("sdsen_s3"), "sdsen_s"),
    ],
)
def test_unknown_words_name_the_nearest(wrong, nearest):
    with pytest.raises(BadArgument, match=f" {nearest}"):
        wrong()


def test_rain_is_none_or_a_style():
    assert [*FIELDS["rain"].choices] == [*STYLES]
    assert read_overrides(["--rain", ""]) == {"rain": ""}
    synthetic = override(Settings(), {"rain": "rain800", "clean_dir": "clean"})
    assert synthetic.clean_dir == str(ROOT / "clean")
    assert override(synthetic, {"rain": "", "clean_dir": ""}) == override(Settings(), {})
    with pytest.raises(BadArgument):
        override(synthetic, {"rain": ""})


def test_every_network_and_every_loss_can_be_built():
    names = {name: network.__name__ for name, network in model.NETWORKS.items()}
    assert names == {"dsen": "DSEN", "coarse2fine": "Coarse2Fine", "php": "PHP"}
    for loss in FIELDS["loss"].choices:
        network = loss if loss in model.NETWORKS else "dsen"
        losses.build(override(Settings(), {"network": network, "loss": loss, "refined": False}))


def test_network_fields_are_the_arguments_of_the_networks():
    assert NETWORK_FIELDS[:3] == ["network", "channel", "depth"]
    assert {"dilated", "refined", "block", "pooling"} < {*NETWORK_FIELDS}
    assert not {"vgg_weights", "colour_weight", "loss", "steps"} & {*NETWORK_FIELDS}


@pytest.mark.parametrize("name", PRESETS)
def test_settings_survive_a_checkpoint(name):
    folders = {"data_dir": str(ROOT / "data" / "rain800"), "clean_dir": str(ROOT / "data" / "clean")}
    folders |= {"more_data": (str(ROOT / "data" / "more"), "/far"), "exclude": (str(ROOT / "data" / "test"),)}
    settings = resolve(name, {"milestones": (4,), "rain": "rain800", **folders, "log_dir": "/elsewhere"})
    values = to_dict(settings)
    assert from_dict(values) == settings
    assert from_dict({**values, "milestones": [4], "of_the_future": 1}) == settings
    assert (values["data_dir"], values["model_dir"], values["log_dir"]) == ("data/rain800", "models", "/elsewhere")
    assert (values["clean_dir"], values["more_data"]) == ("data/clean", ("data/more", "/far"))


def test_stored_values_of_other_versions(monkeypatch):
    """A renamed style has its new name; a choice that is gone, or not there yet, is the default, with a warning."""
    warnings = []
    monkeypatch.setattr(settings_module.log, "warning", warnings.append)
    stored = to_dict(resolve("dsen", {"rain": "rain800", "clean_dir": "/clean"}))
    assert from_dict({**stored, "rain": "rain100h_stepped"}).rain == "rain100h"
    assert not warnings
    old = from_dict({**stored, "rain": "rain_of_the_past", "compile": "sometimes", "channel": 6})
    assert (old.rain, old.clean_dir, old.compile, old.channel, old.stage_num) == ("", "", "auto", 6, 1)
    assert len(warnings) == 2
    with pytest.raises(BadArgument):
        from_dict({**stored, "channel": "6"})


@pytest.mark.parametrize(("words", "lines"), [(["-h"], 75), (["-h", "all"], 130)])
def test_help_lists_the_usual_settings_or_all(monkeypatch, capsys, words, lines):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        make_parser(FIELDS, "").parse_args(words)
    assert end.value.code == 0
    text = capsys.readouterr().out
    shown = {name for name in FIELDS if f"\n  --{name} " in text}
    assert shown == {name for name, field in FIELDS.items() if field.usual or "all" in words}
    assert {"network", "data_dir", "steps", "lr", "run", "device"} <= shown
    assert len(text.splitlines()) <= lines - 12  # main.py has arguments of its own
    assert max(map(len, text.splitlines())) <= 100


def test_steps_of_a_training_that_counts_epochs_are_refused():
    with pytest.raises(BadArgument):
        resolve("php", {"steps": 10})
    settings = resolve("php", {"steps": 10, "epochs": 0, "milestones": (5,)})
    assert (settings.steps, settings.epochs) == (10, 0)
    assert from_dict(to_dict(resolve("php"))).epochs == 250

"""Settings: the order of defaults, preset and overrides, and what is refused."""

from pathlib import Path

import pytest

from base.errors import UserError
from base.files import ROOT
from presets import PRESETS
from settings import FIELDS, Settings, from_dict, make_parser, override, read_overrides, resolve, to_dict


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


def test_default_paths_hang_on_the_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert resolve().log_dir == str(ROOT / "logdir")
    assert resolve().data_dir == ""


def test_typed_paths_hang_on_the_caller(monkeypatch, tmp_path):
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
    folders = (str(Path.cwd() / "a"), "/b")  # typed paths start at the caller's working directory
    assert read_overrides("--more_data a /b --exclude=".split()) == {"more_data": folders, "exclude": ()}
    assert read_overrides("--lr 1 --steps 2 --lr 3".split()) == {"lr": 3.0, "steps": 2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chanel", "3"], "unknown setting --chanel; the nearest is --channel"),
        (["--qqq", "3"], "unknown setting --qqq; there are --network, --channel, "),
        (["--steps", "1.5"], "--steps takes one whole number, got '1.5'"),
        (["--steps"], "--steps takes one whole number, got 'nothing'"),
        (["--use_se", "maybe"], "--use_se takes true or false"),
        (["--lr", "1", "2"], "--lr takes one number"),
        (["--milestones", "x"], "--milestones takes whole numbers"),
        (["word"], "'word' stands alone"),
        (["--log_level", "chatty"], "log_level can't be 'chatty'"),
        (["--batch_size", "0"], "batch_size must be at least 1"),
    ],
)
def test_words_that_are_refused(words, message):
    with pytest.raises(UserError) as error:
        read_overrides(words)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"chanel": 3}, "unknown setting 'chanel'; the nearest is channel"),
        ({"channel": "3"}, "channel must be of type int"),
        ({"channel": True}, "channel must be of type int"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"lr": float("nan")}, "lr must be at least 0"),
        ({"lr": float("inf")}, "lr must be at least 0"),
        ({"link": "concatenate"}, "link can't be 'concatenate'; the nearest is concat"),
        ({"milestones": (5, 3)}, "milestones must be rising"),
        ({"network": "dsen", "depth": 3}, "depth must be at least 4"),
        ({"milestones": (0, 3)}, "milestones must be rising"),
        ({"milestones": ("3",)}, "milestones must be whole numbers"),
        ({"more_data": "folder"}, "more_data must be of type tuple"),
        ({"more_data": (3,)}, "more_data must be paths"),
        ({"group": "z2", "aggregation": "max"}, "aggregation max and mean"),
        ({"loss": "ssim", "patch_size": 10}, "loss ssim needs crops of at least 11x11"),
        ({"run": "../out"}, "run is the name of a folder"),
        ({"rain": "rain100x"}, "rain can't be 'rain100x'; the nearest is rain100"),
        ({"rain": "snow"}, "rain can't be 'snow'; there are rain100h, rain100l, rain800"),
        ({"clean_dir": "photographs"}, "clean_dir is for images that rain is drawn on: name its style with --rain"),
    ],
)
def test_values_that_are_refused(values, message):
    with pytest.raises(UserError) as error:
        override(Settings(), values)
    assert str(error.value).startswith(message)


def test_rain_is_none_or_a_style_of_rain_py():
    assert read_overrides(["--rain", ""]) == {"rain": ""}
    drawn = override(Settings(), {"rain": "rain800", "clean_dir": "clean"})
    assert drawn.clean_dir == str(ROOT / "clean")
    assert override(drawn, {"rain": "", "clean_dir": ""}) == override(Settings(), {})
    with pytest.raises(UserError, match="name its style with --rain"):
        override(drawn, {"rain": ""})


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="unknown preset 'sdsen_s3'; the nearest is sdsen_s"):
        resolve("sdsen_s3")


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


def test_every_knob_says_what_it_is():
    parser_help = make_parser("").format_help()
    for name, field in FIELDS.items():
        assert len(field.metadata["text"]) > 10
        assert f"--{name} " in parser_help


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"average": 1.0}, "average is a decay below 1"),
    ],
)
def test_growth_and_average_that_are_not_possible(overrides, message):
    with pytest.raises(UserError, match=message):
        resolve("sdsen", overrides)


def test_steps_of_a_training_that_counts_epochs_are_refused():
    with pytest.raises(UserError, match="counts 250 epochs"):
        resolve("php", {"steps": 10})
    settings = resolve("php", {"steps": 10, "epochs": 0, "milestones": (5,)})
    assert (settings.steps, settings.epochs) == (10, 0)
    assert from_dict(to_dict(resolve("php"))).epochs == 250

"""Options on a command line: names that other programs use, and the help."""

import dataclasses
import re

import pytest

import convert
import main
import rain
import show
from base.errors import BadArgument
from base.options import SYNONYMS, find, make_parser, option, read_options
from settings import FIELDS


def suggested(name):
    with pytest.raises(BadArgument) as error:
        find(FIELDS, name)
    return re.findall(r"(?<=did you mean )--?\w+", str(error.value))


MEANT = {
    "lr": "learning_rate learning-rate LR", "device": "gpu cpu", "show_dir": "output", "num_workers": "workers",
    "batch_size": "bs batch batch-size batchsize", "data_dir": "data dataset", "m": "checkpoint resume pretrained",
    "run": "name", "epochs": "num_epochs", "steps": "iterations iters", "patch_size": "size crop_size",
    "precision": "fp16 amp", "channel": "chanel", "model_dir": "modeldir", "seed": "seeds",
}  # fmt: skip


@pytest.mark.parametrize(("name", "meant"), [(name, meant) for meant, names in MEANT.items() for name in names.split()])
def test_unknown_names_suggest_what_they_mean(name, meant):
    assert suggested(name) == ["-m" if meant == "m" else f"--{meant}"]


@pytest.mark.parametrize("name", ["foo", "momentum", "threads", "weight_decay", "help_me", "x", "host"])
def test_names_near_nothing_suggest_nothing(name):
    assert suggested(name) == []


def test_a_suggestion_exists_and_no_name_means_two():
    assert {*SYNONYMS} <= {"m", *FIELDS}
    names = [name for elsewhere in SYNONYMS.values() for name in elsewhere.split()]
    assert len({*names}) == len(names)
    assert not {*names} & {*FIELDS}


def test_only_options_of_the_script_are_suggested():
    with pytest.raises(BadArgument) as error:
        find({"lr": FIELDS["lr"]}, "gpu")
    assert "device" not in str(error.value)


def test_the_help_lists_an_option_in_the_group_of_arguments_of_that_title(capsys):
    @dataclasses.dataclass
    class Few:
        flag: bool = option(True, "a flag", group="Model")
        size: int = option(3, "a size", group="Data")
        rare: int = option(3, "rarely needed", group="Data", usual=False)

    parser = make_parser(read_options(Few), "What it does.")
    parser.add_argument_group("Model").add_argument("-m", help="a checkpoint")
    for words, rare in (["-h"], False), (["-h", "all"], True):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        _, _, _, model, data, *_ = capsys.readouterr().out.split("\n\n")
        assert model.splitlines()[0] == "Model:"
        assert "-m" in model.splitlines()[1]
        assert "--flag true" in model.splitlines()[2]
        assert ("--rare" in data) == rare


HELPS = [
    *((main, ["-a", action, "-h", "all"]) for action in main.ACTIONS),
    *(
        (script, [*words, "-h"])
        for script, words in ((main, []), (show, []), (convert, []), (rain, []), (rain, ["draw"]))
    ),
]


@pytest.mark.parametrize(("script", "words"), HELPS)
def test_the_help_is_at_most_100_columns_wide(script, words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        script.main(words)
    assert not end.value.code
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("words", "has", "lacks"),
    [
        ("main -a train", "lr steps data_dir device accumulate", "show_dir"),
        ("main -a test", "data_dir device precision memory_gib", "lr steps save_steps patch_size show_dir"),
        ("main -a export", "run model_dir data_dir stage_num", "lr device channel"),
        ("main -a tilt", "rain device", "lr steps channel"),
        ("main -a tables", "jobs minutes write", "lr data_dir"),
        ("show", "data_dir device mirror show_dir", "lr steps log_dir"),
    ],
)
def test_a_help_lists_what_its_command_uses(words, has, lacks, capsys):
    script, *arguments = words.split()
    with pytest.raises(SystemExit):
        {"main": main, "show": show}[script].main([*arguments, "-h"])
    listed = {*re.findall(r"^  --(\w+) ", capsys.readouterr().out, re.MULTILINE)}
    assert {*has.split()} <= listed
    assert not {*lacks.split()} & listed


def test_each_action_is_explained():
    assert all(
        re.search(rf"^    -a {action} .*main\.py -a {action}", main.__doc__, re.MULTILINE) for action in main.ACTIONS
    )

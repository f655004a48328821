"""Options: fields of a dataclass that a command line sets: bool, int, float, str or a tuple of these."""

import argparse
import dataclasses
import difflib
import inspect
import os
import textwrap
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from base.console import WIDTH, Parser
from base.errors import BadArgument

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
VALUES = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
INDENT = 25  # of the texts in the help, columns
NEAR = 0.7  # similarity of a mistyped word, of at most 1
FEW = 10  # choices that an error lists
SYNONYMS = {  # names that settings, and argument -m, have in other programs
    "m": "checkpoint ckpt resume resume_from pretrained weights load model_path",
    "lr": "learning_rate rate",
    "steps": "iterations iters iter niter num_iter max_iter max_steps",
    "epochs": "epoch num_epochs max_epochs",
    "batch_size": "bs batch",
    "patch_size": "size crop crop_size image_size img_size",
    "data_dir": "data dataset data_path dataroot root train_dir val_dir test_dir input",
    "aug_data": "aug augment augmentation",
    "optimizer": "optim",
    "schedule": "scheduler lr_scheduler",
    "clip_norm": "clip clip_grad grad_clip max_grad_norm",
    "average": "ema ema_decay",
    "save_steps": "save_every save_freq val_steps eval_steps",
    "log_steps": "log_every log_interval print_freq",
    "stage_num": "stages num_stages",
    "channel": "channels width",
    "depth": "layers num_layers",
    "device": "gpu gpus gpu_id gpu_ids cuda cpu",
    "precision": "fp16 bf16 half amp dtype",
    "num_workers": "workers",
    "memory_gib": "memory tile tile_size",
    "mirror": "tta self_ensemble",
    "show_dir": "output output_dir out out_dir result_dir results",
    "run": "name exp exp_name experiment",
    "model_dir": "save_dir checkpoint_dir",
    "seed": "random_seed manual_seed",
    "warmup": "warmup_steps",
    "log_level": "verbose quiet",
}


def option(default: Any, text: str, **details: Any) -> Any:
    """A field of a dataclass; `details` are the fields of `Option` from `group` on."""
    return dataclasses.field(default=default, metadata={"text": text, **details})


@dataclasses.dataclass(frozen=True)
class Option:
    name: str
    kind: type  # of a value, or of each of `several`
    several: bool  # whether the value is a tuple
    default: Any
    text: str
    group: str  # heading in the help
    choices: tuple[str, ...] = ()  # besides the default; empty: any value
    minimum: float | None = None
    path: bool = False
    usual: bool = True  # whether `-h` shows it; `-h all` shows all

    def parse(self, words: list[str]) -> Any:
        try:
            values = tuple(self._convert(word) for word in words if word or not self.several)
        except (ValueError, KeyError):
            raise self._wrong_type(" ".join(words)) from None
        return self.check(values if self.several or len(values) != 1 else values[0])

    def _convert(self, word: str) -> Any:
        if self.path:  # relative to the caller's working directory
            return os.path.abspath(Path(word).expanduser()) if word else word
        return BOOLEANS[word.lower()] if self.kind is bool else self.kind(word)

    def check(self, value: Any) -> Any:
        """Return `value`. Raises BadArgument if the option can't have it."""
        kinds = (int, float) if self.kind is float else (self.kind,)
        values = value if self.several else (value,)
        if not isinstance(values, tuple) or any(type(item) not in kinds for item in values):
            raise self._wrong_type(value)
        if not self.has_choice(value):
            raise BadArgument(f"{self.name} can't be {value!r}{nearest(value, [self.default, *self.choices])}")
        if self.minimum is not None and not self.minimum <= value < float("inf"):
            raise BadArgument(f"{self.name} must be at least {self.minimum}, got {value}")
        return value

    def has_choice(self, value: Any) -> bool:
        return not self.choices or value in (self.default, *self.choices)

    def _wrong_type(self, value: Any) -> BadArgument:
        what = "a path" if self.path else VALUES[self.kind]
        return BadArgument(f"{self.name} takes {what}{' or several' if self.several else ''}, got {value!r}")

    def help(self) -> str:
        head = f"  --{self.name} " + (as_text(self.default) or "''")
        choices = dict.fromkeys(filter(None, (self.default, *self.choices)))
        text = f"{self.text} [{', '.join(choices)}]" if self.choices else self.text
        return textwrap.fill(text, WIDTH, initial_indent=f"{head:{INDENT - 2}}  ", subsequent_indent=" " * INDENT)


def read_options(cls: type) -> dict[str, Option]:
    """The options of a dataclass by name: its own in their order, then those it inherits."""
    found, hints, own = {}, typing.get_type_hints(cls), inspect.get_annotations(cls)
    for field in sorted(dataclasses.fields(cls), key=lambda field: field.name not in own):
        kind, several = hints[field.name], typing.get_origin(hints[field.name]) is tuple
        kind = typing.get_args(kind)[0] if several else kind
        found[field.name] = Option(field.name, kind, several, field.default, **field.metadata)
    return found


def read_words(options: dict[str, Option], words: Iterable[str]) -> dict[str, Any]:
    """Values by name from `--name value`, `--name=value` and `--name value value`. Raises BadArgument."""
    values: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name, equals, rest = word[2:].partition("=")
            values[name] = [rest] if equals else []
        elif not values:
            raise BadArgument(f"{word!r} belongs to no setting: settings are given as --name value")
        else:
            values[name].append(word)
    return {name: find(options, name).parse(text) for name, text in values.items()}


def find(options: dict[str, Option], name: str) -> Option:
    """The option of that name. Raises BadArgument, which names one of a like meaning, or else a like spelling."""
    if name in options:
        return options[name]
    plain = name.lower().replace("-", "_")
    meant = [here for here, elsewhere in SYNONYMS.items() if plain in elsewhere.split() and here in ("m", *options)]
    meant = meant or difflib.get_close_matches(plain, options, 1, NEAR)
    hint = f"; did you mean {'-m' if meant[0] == 'm' else f'--{meant[0]}'}?" if meant else "; -h all lists all"
    raise BadArgument(f"unknown setting --{name}{hint}")


def nearest(word: Any, known: Iterable[str]) -> str:
    """The end of an error about an unknown word: the nearest known one, or all if they are few."""
    known = list(dict.fromkeys(filter(None, known)))
    close = difflib.get_close_matches(str(word), known, 1, NEAR)
    return f"; the nearest is {close[0]}" if close else f"; there are {', '.join(known)}" if len(known) <= FEW else ""


def as_text(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return " ".join(map(as_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def make_parser(options: dict[str, Option], description: str) -> Parser:
    """A parser whose help lists options, `-h` the usual and `-h all` all of them; it does not read them.

    An option's group is listed with the parser's own group of that title.
    """

    class Help(argparse.Action):
        def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
            sections = {text.partition("\n")[0]: text for text in parser.format_help().rstrip().split("\n\n")}
            shown = [each for each in options.values() if each.usual or values == "all"]
            for each in shown:
                title = f"{each.group}:"
                sections[title] = f"{sections.get(title, title)}\n{each.help()}"
            more = [f"{len(options) - len(shown)} more settings: -h all"] if len(shown) < len(options) else []
            print("\n\n".join([*sections.values(), *more]))
            parser.exit()

    parser = Parser(description=description, add_help=False)
    parser.add_argument("-h", "--help", nargs="?", metavar="all", action=Help, help="show the usual settings, or all")
    return parser

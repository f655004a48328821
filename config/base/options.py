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

from base.console import Parser
from base.errors import BadArgument

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
VALUES = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
WIDTH, INDENT = 100, 25  # of the help, columns


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
    """The option of that name. Raises BadArgument, which names the nearest."""
    if name not in options:
        raise BadArgument(f"unknown setting --{name}{nearest(f'--{name}', [f'--{known}' for known in options])}")
    return options[name]


def nearest(word: Any, known: Iterable[str]) -> str:
    """The end of an error about an unknown word: the nearest known one, or all of them."""
    close = difflib.get_close_matches(str(word), list(known), 1, 0.5)
    return f"; the nearest is {close[0]}" if close else f"; there are {', '.join(filter(None, known))}"


def as_text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def make_parser(options: dict[str, Option], description: str) -> Parser:
    """A parser whose help lists options, `-h` the usual and `-h all` all of them; it does not read them."""

    class Help(argparse.Action):
        def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
            print(parser.format_help())
            shown = [each for each in options.values() if each.usual or values == "all"]
            for group in dict.fromkeys(each.group for each in shown):
                print(f"{group}:", *(each.help() for each in shown if each.group == group), sep="\n")
            if len(shown) < len(options):
                print(f"{len(options) - len(shown)} more settings: -h all. A setting is changed by --name value.")
            parser.exit()

    parser = Parser(description=description, add_help=False)
    parser.add_argument("-h", "--help", nargs="?", metavar="all", action=Help, help="show the usual settings, or all")
    return parser

"""What every script needs on the command line: an argument parser, the log, Ctrl-C and exit statuses."""

import argparse
import io
import logging
import math
import os
import re
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NoReturn

from tqdm import tqdm

from base.errors import BadArgument, UserError
from base.files import ROOT

log = logging.getLogger("sdsen")
WIDTH = 100  # of the help, columns
CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # colours, the cursor, the direction of text


class Parser(argparse.ArgumentParser):
    """An argument parser that raises BadArgument, and takes no abbreviations and no empty words.

    Indented lines of its description stay.
    """

    def __init__(self, description: str = "", **keywords: Any):
        formatter = partial(argparse.RawDescriptionHelpFormatter, max_help_position=25, width=WIDTH)
        parts = (part if "\n  " in f"\n{part}" else textwrap.fill(part, WIDTH) for part in description.split("\n\n"))
        keywords = {"formatter_class": formatter, "allow_abbrev": False, **keywords}
        super().__init__(description="\n\n".join(parts), **keywords)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        known, rest = super().parse_known_args(args, namespace)
        for name, value in vars(known).items():
            if "" in (value if isinstance(value, list) else [value]) and value != self.get_default(name):
                self.error(f"{name} is empty: name something or leave it out")
        return known, rest

    def error(self, message: str) -> NoReturn:
        raise BadArgument(f"{message} (see {self.prog} --help)")


def set_up_log(level: str = "info") -> None:
    """Print the program's log on standard output from `level` up; of ranks after the first only from warnings up."""
    handler = LogHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"{_rank_prefix()}%(message)s"))
    handler.setLevel(logging.WARNING if _rank_prefix() else logging.DEBUG)
    log.handlers = [handler]
    log.propagate = False
    logging.raiseExceptions = False  # else a log file on a full disk prints a traceback per line
    log.setLevel(level.upper())


def in_terminal() -> bool:
    """Whether to show progress bars: standard error is a terminal, and this is the first rank."""
    return sys.stderr.isatty() and not _rank_prefix()


def _rank_prefix() -> str:
    """The start of each line: "rank N: " in the processes of torchrun except the first."""
    rank = os.environ.get("RANK", "0") if "TORCHELASTIC_RUN_ID" in os.environ else "0"
    return "" if rank == "0" else f"rank {rank}: "


def command_line(script: str, *words: str) -> str:
    """The command that runs a script of `config`, such as "main.py", as it is typed in the working directory."""
    path = str(ROOT / "config" / script)
    return shlex.join(["python", min(os.path.relpath(path), path, key=len), *words])


def printable(text: object, kept: str = "") -> str:
    """Text whose control characters, which names of files may have, are escaped, except for those that are `kept`."""
    return CONTROL.sub(lambda found: found[0] if found[0] in kept else ascii(found[0])[1:-1], str(text))


class LogHandler(logging.StreamHandler):
    """Writes lines above the progress bars that a terminal shows."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), kept="\n\t")

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(self.stream):
            super().emit(record)


class Progress(tqdm):
    """A bar in a terminal; elsewhere a line of the log every `EVERY` seconds. Ranks after the first show neither.

    `total` may be 1.0 and the steps shares of it, whose rounding errors are dropped.
    """

    EVERY = 30

    def __init__(self, iterable: Iterable | None = None, desc: str = "", total: float | None = None, **keywords: Any):
        self.in_lines = not in_terminal()
        # Lines go to the log. With a file of its own it is no bar that LogHandler would show again after each of them.
        wait = {"delay": self.EVERY, "mininterval": self.EVERY, "file": io.StringIO()} if self.in_lines else {}
        keywords = {"leave": False, "dynamic_ncols": True, **keywords, **wait}
        super().__init__(iterable, desc, total, miniters=0, disable=bool(_rank_prefix()), **keywords)

    def update(self, n: float = 1) -> bool | None:
        return super().update(n if self.total is None else min(n, self.total - self.n))

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if not self.in_lines:
            super().display(msg, pos)
        elif msg is None and 0 < round(self.n, 6) < (self.total or math.inf):
            of = f" of {self.total}" if self.total else ""
            done = f"{self.n:.0%}" if isinstance(self.total, float) else f"{self.n}{of} {self.unit}s"
            left = self.format_dict["elapsed"] * ((self.total or self.n) / self.n - 1)
            log.info(f"{self.desc and self.desc + ': '}{done}{f', left {self.format_interval(left)}' if left else ''}")


class Stopped(Exception):
    """Work that is given up after Ctrl-C or SIGTERM: see `Interrupt.check`."""


class Interrupt:
    """Within this, Ctrl-C and SIGTERM only set `requested`, so that the caller can finish its work first.

    A second Ctrl-C raises KeyboardInterrupt. Within `AGAIN` seconds it is still the first: torchrun sends two signals.
    """

    AGAIN = 2.0
    requested = False

    def check(self) -> None:
        """Raise Stopped where a signal has come: for work that is repeated when the program resumes."""
        if self.requested:
            raise Stopped

    def __enter__(self) -> "Interrupt":
        self.old = {stop: signal.signal(stop, self._request) for stop in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _request(self, number: int, _: object) -> None:
        if not self.requested:
            self.requested, self.since = True, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.since > self.AGAIN:
            raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        for stop, handler in self.old.items():
            signal.signal(stop, handler)


def run_script(main: Callable[[list[str]], int | None]) -> None:
    """Run `main(arguments)` and exit: a UserError becomes one line on standard error and exit status 2.

    Ctrl-C or SIGTERM become 130.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # whose ranks may wait for one that has ended
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names that they can't print
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except UserError as error:
        sys.stderr.write(f"{_rank_prefix()}error: {printable(error)}\n")  # one write: ranks do not mix their lines
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `main.py -a models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)

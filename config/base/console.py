"""The command line's side of every script: arguments, the log, Ctrl-C, and how errors end a program."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable

from base.errors import UserError

log = logging.getLogger("sdsen")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as all others are, and that takes no abbreviations."""

    def __init__(self, **keywords):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **keywords})

    def error(self, message: str) -> None:
        raise UserError(f"{message} (see {self.prog} --help)")


def set_up_log(level: str = "info") -> None:
    """Send the program's log to standard output as plain lines, at `level` ("debug", "info", "warning", "error").

    Of several processes that torchrun started, the first one speaks; from the others come warnings and errors alone.
    """
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"{_speaker()}%(message)s"))
    if _speaker():
        handler.setLevel(logging.WARNING)
    log.handlers = [handler]
    log.propagate = False
    logging.raiseExceptions = False  # a log file on a full disk must not print a traceback a line
    log.setLevel(level.upper())


def in_terminal() -> bool:
    """Whether progress bars are looked at: standard error is a terminal, and this process the one that speaks."""
    return sys.stderr.isatty() and not _speaker()


def _speaker() -> str:
    """What lines begin with: "rank N: " in the processes behind the first that torchrun started."""
    rank = os.environ.get("RANK", "0") if "TORCHELASTIC_RUN_ID" in os.environ else "0"
    return "" if rank == "0" else f"rank {rank}: "


class Interrupt:
    """Ctrl-C and SIGTERM ask for an end, by `asked`; what is under way is finished first."""

    def __enter__(self):
        self.asked = False
        self.old = {name: signal.signal(name, self._ask) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, *_):
        self.asked = True

    def __exit__(self, *_):
        for name, handler in self.old.items():
            signal.signal(name, handler)


def run_script(main: Callable[[list[str]], int | None]) -> None:
    """Run `main(arguments)` and exit: a UserError becomes one line on standard error and exit status 2, Ctrl-C 130."""
    try:
        sys.exit(main(sys.argv[1:]) or 0)
    except UserError as error:
        sys.stderr.write(f"{_speaker()}error: {error}\n")  # at once, so that several processes' lines stay whole
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `main.py -a models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)

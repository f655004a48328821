"""Ctrl-C and SIGTERM; commands to paste; words that are empty."""

import shlex
import signal

import pytest

from base.console import Interrupt, Parser, Stopped, command_line
from base.errors import BadArgument
from base.files import ROOT


@pytest.mark.parametrize("folder", [ROOT, ROOT / "config", ROOT / "tests" / "base", "/"])
def test_a_command_can_be_pasted_where_the_user_is(monkeypatch, folder):
    monkeypatch.chdir(folder)
    first, script, *words = shlex.split(command_line("main.py", "-m", "my run's"))
    assert (first, words) == ("python", ["-m", "my run's"])
    assert (ROOT / folder / script).samefile(ROOT / "config" / "main.py")


def test_a_signal_is_noted_and_its_former_handler_comes_back():
    received = []

    def handler(number, _):
        received.append(number)

    former = signal.signal(signal.SIGTERM, handler)
    try:
        with Interrupt() as interrupt:
            assert not interrupt.requested
            signal.raise_signal(signal.SIGTERM)
            assert interrupt.requested
        assert not received
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, former)


def test_a_second_interrupt_ends_at_once_unless_it_follows_the_first_closely(monkeypatch):
    with Interrupt() as interrupt:
        interrupt.check()
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stopped):
            interrupt.check()
        monkeypatch.setattr(Interrupt, "AGAIN", -1.0)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("words", [["-m", ""], ["-i", "a", ""]])
def test_empty_words_are_refused(words):
    parser = Parser()
    parser.add_argument("-m")
    parser.add_argument("-n", default="")
    parser.add_argument("-i", nargs="+", action="extend")
    assert parser.parse_args([]).n == ""
    with pytest.raises(BadArgument):
        parser.parse_args(words)

"""Ctrl-C and SIGTERM; commands to paste."""

import shlex
import signal

import pytest

from base.console import Interrupt, command_line
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

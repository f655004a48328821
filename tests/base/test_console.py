"""Ctrl-C and SIGTERM; commands to paste; what goes to the terminal; words that are empty; progress."""

import logging
import shlex
import signal
import sys

import pytest
import tqdm.std

from base.console import Interrupt, LogHandler, Parser, Progress, Stopped, command_line, log, run_script, set_up_log
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


@pytest.fixture
def clock(monkeypatch):
    """A function that lets time pass, seconds, and the lines of the log."""
    now, lines = [1000.0], []
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    monkeypatch.setattr(log, "info", lines.append)

    def wait(seconds):
        now[0] += seconds

    return wait, lines


def test_without_a_terminal_a_line_comes_now_and_then(clock, capsys):
    wait, lines = clock
    for _ in Progress(range(100), "reading", unit="image"):
        wait(1)
    assert lines == [
        f"reading: {n} of 100 images, left {left}" for n, left in ((30, "01:10"), (60, "00:40"), (90, "00:10"))
    ]
    assert capsys.readouterr().err == ""


def test_short_work_shows_no_line(clock):
    wait, lines = clock
    for _ in Progress(range(29)):
        wait(1)
    assert not lines


def test_shares_end_at_one_in_spite_of_their_rounding(clock):
    wait, lines = clock
    with Progress(total=1.0) as bar:
        for _ in range(11):
            wait(40)
            bar.update(0.1)
        assert bar.n == 1.0
    assert lines[0] == "10%, left 06:00"
    assert len(lines) == 9  # none for what is done
    assert not any("-" in line for line in lines)


def test_without_a_total_the_steps_are_counted(clock):
    wait, lines = clock
    for _ in Progress(iter(range(2)), unit="file"):
        wait(31)
    assert lines == ["1 files", "2 files"]


def test_a_terminal_shows_a_bar_and_no_lines(clock, monkeypatch, capsys):
    wait, lines = clock
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for _ in Progress(range(3), "reading"):
        wait(40)
    assert not lines
    assert "reading" in capsys.readouterr().err


def test_lines_of_the_log_leave_the_bar_whole(clock, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", sys.stderr)  # both are the terminal
    with Progress(total=3):
        LogHandler(sys.stdout).emit(logging.makeLogRecord({"msg": "a line"}))
    before, after = capsys.readouterr().err.split("a line\n")
    assert before.endswith("\r")
    assert "0/3" in after


def test_lines_of_progress_go_through_the_log_once(monkeypatch, capsys, caplog):
    monkeypatch.setattr(Progress, "EVERY", 0)
    monkeypatch.setattr(log, "handlers", [LogHandler(sys.stdout)])
    monkeypatch.setattr(log, "propagate", False)
    caplog.set_level(logging.INFO, log.name)  # which also clears the cache of levels
    for _ in Progress(range(4), unit="image"):
        pass
    assert [line.split(" images")[0] for line in capsys.readouterr().out.splitlines()] == ["1 of 4", "2 of 4", "3 of 4"]


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


def test_sigterm_ends_a_script_as_ctrl_c_does(monkeypatch):
    former = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            run_script(lambda words: signal.raise_signal(signal.SIGTERM))
        assert ended.value.code == 130
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with pytest.raises(SystemExit) as ended:
            run_script(lambda words: signal.raise_signal(signal.SIGTERM))
        assert ended.value.code == 0
    finally:
        signal.signal(signal.SIGTERM, former)


def test_names_in_messages_do_not_steer_a_terminal(monkeypatch, capsys):
    def fail(words):
        raise BadArgument("x\x1b[31m\n\u202ey")

    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        run_script(fail)
    signal.signal(signal.SIGTERM, former)
    assert capsys.readouterr().err.endswith("x\\x1b[31m\\n\\u202ey\n")
    monkeypatch.setattr(log, "handlers", log.handlers)
    set_up_log()
    log.warning("two\n\tlines \x9b\u200d\u3000é")
    assert capsys.readouterr().out == "two\n\tlines \\x9b\u200d\u3000é\n"

"""Ctrl-C and SIGTERM."""

import signal

from base.console import Interrupt


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

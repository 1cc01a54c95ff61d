"""Ctrl-C waits for the end of a turn, and then does what it would have done."""

import signal

import pytest

from jaxinfer.interrupts import interrupts_held


def interrupted(done: list[str]) -> None:
    with interrupts_held():
        signal.raise_signal(signal.SIGINT)
        done.append("all of it")


def test_an_interrupt_comes_when_the_turn_is_over():
    done = []
    with pytest.raises(KeyboardInterrupt):
        interrupted(done)
    assert done == ["all of it"]


def test_a_handler_that_is_no_function_is_not_lost(monkeypatch):
    raised = []
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process
    try:
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
            monkeypatch.setattr(signal, "raise_signal", raised.append)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)
    assert raised == [signal.SIGINT]

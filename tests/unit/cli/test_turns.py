"""Ctrl-C in a conversation: counted, and an exception only where something waits for it."""

from __future__ import annotations

import signal

import pytest

from tunesmith.cli.turns import Interrupts


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_only_the_patienceth_one_is_an_exception() -> None:
    before = signal.getsignal(signal.SIGINT)
    interrupts = Interrupts()
    with interrupts.noted(patience=2):
        press()
        assert interrupts.num_seen == 1
        with pytest.raises(KeyboardInterrupt):
            press()
        press()  # what tells of the second one must not be ended by a third
        assert interrupts.num_seen == 3
    assert signal.getsignal(signal.SIGINT) == before


def test_between_two_prompts_it_is_counted_only() -> None:
    interrupts = Interrupts()
    with interrupts.noted():
        with pytest.raises(KeyboardInterrupt), interrupts.raised():
            press()
        press()
        with interrupts.noted(patience=1), pytest.raises(KeyboardInterrupt):
            press()
        press()
        assert interrupts.num_seen == 2

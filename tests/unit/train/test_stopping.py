"""Signals that end a run: noted, announced, and handed back."""

from __future__ import annotations

import signal

import pytest

from tunesmith.train.stopping import StopSignals, exit_code, sigterm_exits


def test_the_first_signal_is_noted_and_the_handlers_come_back() -> None:
    said: list[str] = []
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals(said.append) as signals:
        assert exit_code(signals.received) == 0
        signal.raise_signal(signal.SIGTERM)
    assert signals.received is signal.SIGTERM
    assert exit_code(signals.received) == 143
    assert said == ["SIGTERM: finishing this step, then saving"]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_the_second_ctrl_c_stops_at_once() -> None:
    with StopSignals(lambda _: None) as signals:
        signal.raise_signal(signal.SIGINT)
        assert exit_code(signals.received) == 130
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_in_the_middle_of_a_line_that_is_written() -> None:
    """Python raises where a handler writes to the stream that was just being written: the run ended without saving."""

    def reentrant(_: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    with StopSignals(reentrant) as signals:
        signal.raise_signal(signal.SIGTERM)
    assert signals.received is signal.SIGTERM


def test_sigterm_while_loading_leaves_with_its_code() -> None:
    """The bug: SIGTERM before the loop killed the process, and run.json said "running" for ever."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left, sigterm_exits():
        signal.raise_signal(signal.SIGTERM)
    assert left.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before

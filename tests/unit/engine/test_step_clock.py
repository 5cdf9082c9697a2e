"""The clock of steps: the slowest are kept, with the time of each phase, against a known sleep."""

from __future__ import annotations

import gc
import time

import pytest

from tunesmith.engine.step_clock import KEPT, StepClock


def test_a_phase_takes_what_was_slept_in_it() -> None:
    clock = StepClock()
    clock.begin()
    clock.mark("plan")
    time.sleep(0.02)
    clock.mark("wait")
    gc.collect()
    seconds = clock.end()
    (slow,) = clock.slowest()
    assert slow.seconds == seconds and slow.kind == "read" and (slow.number, slow.collections) == (1, 1)
    assert 20 <= slow.phases_ms["wait"] <= 1000 * seconds
    assert sum(slow.phases_ms.values()) == pytest.approx(1000 * seconds, abs=0.01)


def test_the_slowest_steps_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("tunesmith.engine.step_clock.time.perf_counter", lambda: now)
    clock = StepClock()
    lengths = [(7 * n) % 31 for n in range(1, 31)]
    for length in lengths:
        clock.begin()
        now += length
        assert clock.end() == length
    assert [slow.seconds for slow in clock.slowest()] == sorted(lengths, reverse=True)[:KEPT]
    assert lengths[clock.slowest()[0].number - 1] == 30
    clock.clear()
    assert clock.slowest() == []

"""Batches made in the background: in order, bounded, and honest about the wait."""

from __future__ import annotations

import threading
import time

import pytest

from tunesmith.errors import TrainingError
from tunesmith.train.prefetch import Prefetcher


def test_items_come_in_order_and_then_it_is_over() -> None:
    prefetcher = Prefetcher(lambda number: number * number, 3, 7)
    assert [prefetcher.take()[0] for _ in range(4)] == [9, 16, 25, 36]
    for _ in range(2):
        with pytest.raises(TrainingError, match="no data after step 7"):
            prefetcher.take()
    prefetcher.close()


def test_it_runs_ahead_by_its_depth_only() -> None:
    made: list[int] = []
    prefetcher = Prefetcher(lambda number: made.append(number), 0, 100, depth=2)
    prefetcher.take()
    deadline = time.monotonic() + 60
    while len(made) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(0.05)
    assert len(made) == 4  # one taken, two waiting, one in hand
    prefetcher.close()


def test_an_error_reaches_the_taker_and_stays() -> None:
    def make(number: int) -> int:
        if number == 1:
            raise ValueError("row 1 is bad")
        return number

    prefetcher = Prefetcher(make, 0, 5)
    assert prefetcher.take()[0] == 0
    for _ in range(2):
        with pytest.raises(ValueError, match="row 1 is bad"):
            prefetcher.take()
    prefetcher.close()


def test_the_wait_is_measured() -> None:
    """By clocks of the test's own: as long as the making goes on from when it is asked for, and not at all after it."""
    made_s: list[float] = []

    def slow(number: int) -> int:
        time.sleep(1.0 if number == 0 else 0.0)
        made_s.append(time.perf_counter())
        return number

    prefetcher = Prefetcher(slow, 0, 20, depth=10)
    began_s = time.perf_counter()
    waited_s = prefetcher.take()[1]
    assert made_s[0] - began_s - 0.01 <= waited_s <= time.perf_counter() - began_s
    while not prefetcher._ready.full():  # the device works
        time.sleep(0.01)
    assert min(prefetcher.take()[1] for _ in range(10)) < 0.05
    prefetcher.close()


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    Prefetcher(lambda number: number, 0, 10**9).close()
    assert threading.active_count() == before

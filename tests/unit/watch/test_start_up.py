"""The account of a start-up: its parts and the rest are the total, and it ends with the first step."""

from __future__ import annotations

import time

import pytest

from tunesmith.watch.start_up import StartUp, describe, process_age_s


def test_the_parts_and_the_rest_are_the_total() -> None:
    watch = StartUp(2.0)
    for _ in range(2):
        with watch.part("weights"):
            time.sleep(0.01)
    with watch.beside("data"):
        time.sleep(0.01)
    watch.begin_last("first step")
    assert not watch.is_over
    found = watch.finish()
    assert watch.is_over
    assert found["imports"] == 2.0
    assert found["weights"] >= 0.02
    assert found["data (aside)"] >= 0.01
    assert found["total"] >= 2.03
    summed = sum(value for name, value in found.items() if name not in ("total", "data (aside)"))
    assert summed == pytest.approx(found["total"], abs=0.004)


def test_nothing_is_added_after_the_first_step() -> None:
    watch = StartUp()
    found = watch.finish()
    with watch.part("late"):
        time.sleep(0.002)
    assert watch.finish() == found


def test_a_part_within_another_counts_once() -> None:
    watch = StartUp(1.0, "command")
    with watch.part("outer"):
        time.sleep(0.01)
        with watch.part("inner"):
            time.sleep(0.05)
    found = watch.finish()
    assert found["command"] == 1.0
    assert found["inner"] >= 0.05
    assert found["outer"] >= 0.01
    assert found["outer"] + found["inner"] <= found["total"] - 1.0 + 0.005  # rounded to milliseconds each


def test_what_no_part_covers_is_named_after_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start-up on a GPU once had four seconds of "other", and nothing said where."""
    now = 100.0
    monkeypatch.setattr("tunesmith.watch.start_up.time.perf_counter", lambda: now)
    watch = StartUp()
    now += 0.02
    with watch.part("weights"):
        now += 0.03
        with watch.part("read"):
            pass
    now += 0.04
    watch.begin_last("first step")
    now += 0.05
    found = watch.finish()
    assert found["before weights"] == pytest.approx(0.02)
    assert found["before first step"] == pytest.approx(0.04)
    assert "before read" not in found
    assert found["other"] < 0.01


def test_a_part_that_fails_is_counted() -> None:
    watch = StartUp()
    with pytest.raises(KeyError), watch.part("certificate"):
        raise KeyError
    assert "certificate" in watch.finish()


def test_the_line_leaves_out_what_took_no_time() -> None:
    line = describe({"imports": 2.5, "method": 0.001, "other": 0.5, "total": 3.001})
    assert line == "start-up: first step after 3 s: imports 2.5 s, other 500 ms"


def test_the_age_of_this_process() -> None:
    began = time.monotonic()
    first = process_age_s()
    time.sleep(0.05)
    older = process_age_s() - first
    assert 0.03 <= older <= time.monotonic() - began + 0.02  # the kernel counts in hundredths

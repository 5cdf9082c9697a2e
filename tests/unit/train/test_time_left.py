"""The time that a run still takes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from rich.progress import Progress

from tunesmith.train.time_left import TimeLeft, TimeLeftColumn


def said(durations_s: Sequence[float], total: int, done: int = 0) -> list[float | None]:
    """What is said after each step of these durations."""
    now = [100.0]
    left = TimeLeft(done, total, now=lambda: now[0])
    found = []
    for i, duration_s in enumerate(durations_s, start=done + 1):
        now[0] += duration_s
        found.append(left.step(i))
    return found


@pytest.mark.parametrize("done", [0, 40])
def test_the_first_steps_are_not_in_the_mean(done: int) -> None:
    """They took two and more times as long, and so did all that was said until they were forgotten."""
    found = said([9.0, 3.0, 1.0, 1.0, 1.0], total=done + 10, done=done)
    assert found == [None, None, None, 6.0, 5.0]


def test_a_run_that_becomes_slower_is_followed() -> None:
    found = said([1.0] * 300 + [3.0] * 200, total=1000)
    assert found[299] == pytest.approx(700)
    assert found[-1] == pytest.approx(3 * 500)


def test_steps_of_a_minute_have_an_estimate_too() -> None:
    """Only steps of the last thirty seconds were looked at."""
    assert said([60.0] * 5, total=100)[-1] == pytest.approx(95 * 60)


def test_at_the_end_nothing_is_left() -> None:
    assert said([5.0, 1.0], total=2) == [None, 0.0]


def test_the_column_shows_what_is_known() -> None:
    column, progress = TimeLeftColumn(), Progress()
    task = progress.add_task("train", total=10, left_s=None)
    shown = []
    for left_s in (None, 0.0, 59.6, 3_725.0):
        progress.update(task, left_s=left_s)
        shown.append(column.render(progress.tasks[0]).plain)
    assert shown == ["-:--:--", "0:00:00", "0:01:00", "1:02:05"]
    progress.add_task("tokenising", total=None)
    assert column.render(progress.tasks[1]).plain == ""

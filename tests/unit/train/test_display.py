"""What a person watching a run reads."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tunesmith.train.display import Display, _is_shown, best_line, pace_line
from tunesmith.train.loop import LoopResult
from tunesmith.train.metrics import StepMetrics


@pytest.mark.parametrize("total", [1, 7, 60, 150, 1000, 12345, 1_000_000])
def test_losses_are_shown_all_along_and_not_too_often(total: int) -> None:
    """Of 150 steps none after the hundredth was shown."""
    shown = [step for step in range(1, total + 1) if _is_shown(step, total)]
    assert shown[0] == 1
    assert shown[-1] == total
    gaps = [after - before for before, after in pairwise(shown)]
    assert all(gap <= max(1, total // 10) for gap in gaps)
    assert len(shown) <= 75


def test_150_steps_are_shown_by_tens() -> None:
    assert [step for step in range(1, 151) if _is_shown(step, 150)] == [1, 2, 3, *range(10, 151, 10)]


def test_a_validation_loss_that_rose_is_explained() -> None:
    """The last one alone was said, and looked like a bad model."""
    line = best_line([(10, 3.0), (20, 2.1034), (60, 5.4721)])
    assert line is not None
    assert "lowest at step 20 (2.1034) and ended at 5.4721" in line
    assert "by heart" in line
    assert "--set train.max_steps=20" in line


@pytest.mark.parametrize("validations", [[], [(10, 2.0)], [(10, 3.0), (20, 2.0)], [(10, 2.0), (20, 2.01)]])
def test_a_validation_loss_that_fell_needs_no_word(validations: list[tuple[int, float]]) -> None:
    assert best_line(validations) is None


def test_what_training_waited_for_is_said_plainly() -> None:
    assert pace_line(LoopResult(0)) is None
    computing = pace_line(LoopResult(3, duration_s=10.0, data_wait_s=0.001))
    assert computing == "speed: set by the computing itself; 0.0% of the time went into waiting for data"
    data = pace_line(LoopResult(3, duration_s=10.0, data_wait_s=5.0))
    assert data is not None
    assert data.startswith("speed: held up by preparing the data; the device waited 50.0%")


def test_the_progress_line_says_no_time_before_steps_have_settled() -> None:
    """The first steps, which are slower, were in the estimate."""
    display = Display(quiet=True)
    display.start(3, 12)
    (task,) = display._progress.tasks
    said = []
    for step in range(4, 13):
        display.step(StepMetrics(step, 1.0, 2.0, 1.0, 1e-4, 100, 50, 4, 0.5, 0.0, 100 * step))
        said.append(task.fields["left_s"])
    assert said[:3] == [None] * 3
    assert all(left is not None for left in said[3:])
    assert said[-1] == 0

"""How long a run still takes, by the steps it has made."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from rich.progress import Task, TimeRemainingColumn
from rich.text import Text

SETTLING_STEPS = 2
"""Left out: they take memory, choose kernels and record graphs, all of it once."""
_FEWEST_STEPS = 2
_WINDOW_STEPS = 200  # saves and validations between steps are in the mean, too


class TimeLeft:
    """Seconds from the last step to the last of all; None until enough steps have been made to say."""

    def __init__(self, done: int, total: int, now: Callable[[], float] = time.monotonic) -> None:
        self._first, self._total, self._now = done + SETTLING_STEPS, total, now
        self._ends: deque[tuple[int, float]] = deque(maxlen=_WINDOW_STEPS + 1)

    def step(self, number: int) -> float | None:
        """Step `number` (from 1) has ended."""
        if number >= self._total:
            return 0.0
        if number < self._first:
            return None
        self._ends.append((number, self._now()))
        (before, began), (_, ended) = self._ends[0], self._ends[-1]
        steps = number - before
        return (ended - began) / steps * (self._total - number) if steps >= _FEWEST_STEPS else None


class TimeLeftColumn(TimeRemainingColumn):
    """The task's field `left_s`, as rich shows a time; rich's own estimate for a task that has no such field."""

    def render(self, task: Task) -> Text:
        """As in "0:01:30", and "-:--:--" while it is not known."""
        if "left_s" not in task.fields:
            return super().render(task)
        left_s = task.fields["left_s"]
        if left_s is None:
            return Text("-:--:--", style="progress.remaining")
        minutes, seconds = divmod(round(left_s), 60)
        return Text(f"{minutes // 60}:{minutes % 60:02}:{seconds:02}", style="progress.remaining")

"""How long the demo will take on this machine, by what it has measured so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tunesmith.units import format_seconds

if TYPE_CHECKING:
    from tunesmith.bench.matrix import Event

REST = 0.6  # of the matrix's time: training, questions and report, as the demo's own runs divided it on two CPU cores


class DemoClock:
    """Hands events of the matrix on, and after each measurement says how long the whole demo still takes."""

    def __init__(
        self, show: Callable[[Event], None], say: Callable[[str], None], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._show, self._say, self._now = show, say, now
        self._began = now()
        self._ended = 0

    def __call__(self, event: Event) -> None:
        """A measurement began or ended."""
        self._show(event)
        if event.cell is None:
            return
        self._ended += 1
        each_s = (self._now() - self._began) / self._ended
        left_s = each_s * (event.count - self._ended + REST * event.count)
        first = f" (the first of {event.count} measurements took {format_seconds(each_s)})" if self._ended == 1 else ""
        self._say(f"  about {format_seconds(max(1, round(left_s)))} more for the whole demo, as fast as so far{first}")


def outline(methods: int) -> tuple[str, ...]:
    """What the demo is going to do."""
    return (
        f"The demo checks this machine (1), measures {methods} methods of fine-tuning (2), fine-tunes a model with one",
        "of them and asks it questions before and after (3), and writes a report (4, 5). How long that takes is said",
        "after the first measurement.",
    )


def busy_line(load: Mapping[str, Any]) -> str | None:
    """A warning where other programs take the cores; None where the machine has time. Args: load: `machine_load()`."""
    if not load["is_busy"]:
        return None
    return (
        f"This machine is busy: other programs keep {load['busy_cores']:.1f} of its {load['cores']} cores busy. The "
        f"demo will take longer, and its times will be worse and less even than an idle machine's; memory and answers "
        f"stay right."
    )

"""Where the time of the slowest steps went, on the host's clock: what names a stall.

plan | build: tensors, launch: the pass, sample: the choice | wait: for the device | read: tokens handed out
"""

from __future__ import annotations

import gc
import heapq
import time
from dataclasses import dataclass, field

from tunesmith.engine.batch import StepBatch

KEPT = 8
"""Steps that are remembered."""


@dataclass(frozen=True, order=True)
class SlowStep:
    """One step: its seconds, its number since `clear`, what it launched, and milliseconds by phase.

    kind: "decode" where every request had one token, else "prompts"; "read" where nothing was launched.
    collections: full ones of Python's garbage that ran in it.
    """

    seconds: float
    number: int
    kind: str = field(compare=False)
    num_requests: int = field(compare=False)
    num_tokens: int = field(compare=False)
    collections: int = field(compare=False)
    phases_ms: dict[str, float] = field(compare=False)


class StepClock:
    """Times every step, and keeps the slowest. Used by the thread that steps."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what was kept (a warm-up, for instance)."""
        self._kept: list[SlowStep] = []
        self._number = 0
        self.begin()

    def begin(self) -> None:
        """A step begins."""
        self._began_s = self._last_s = time.perf_counter()
        self._spent_s: dict[str, float] = {}
        self._launched = ("read", 0, 0)
        self._collected = _full_collections()

    def mark(self, phase: str) -> None:
        """What ran since the last mark was this phase of the step."""
        now = time.perf_counter()
        self._spent_s[phase] = self._spent_s.get(phase, 0.0) + now - self._last_s
        self._last_s = now

    def launch(self, batch: StepBatch) -> None:
        """The step's pass was launched."""
        self._launched = ("decode" if batch.is_decode else "prompts", len(batch.sequence_slots), batch.num_tokens)
        self.mark("launch")

    def end(self) -> float:
        """The step ends: its seconds."""
        self.mark("read")
        seconds = self._last_s - self._began_s
        self._number += 1
        if len(self._kept) < KEPT or seconds > self._kept[0].seconds:
            phases = {name: round(1000 * spent, 3) for name, spent in self._spent_s.items()}
            collections = _full_collections() - self._collected
            step = SlowStep(seconds, self._number, *self._launched, collections, phases)
            (heapq.heappush if len(self._kept) < KEPT else heapq.heappushpop)(self._kept, step)
        return seconds

    def slowest(self) -> list[SlowStep]:
        """The slowest steps, the slowest first."""
        return sorted(self._kept, reverse=True)


def _full_collections() -> int:
    """Since the process began."""
    return int(gc.get_stats()[2]["collections"])

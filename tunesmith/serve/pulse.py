"""Whether the engine's loop lives: its heartbeats, whether work gets done between them, and how fast tokens come."""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

TOKEN_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)


class TokenGaps:
    """A histogram of the seconds between tokens, counted in a fraction of a microsecond."""

    def __init__(self) -> None:
        self.counts = [0] * (len(TOKEN_S) + 1)
        self.sum_s = 0.0

    def add(self, gap_s: float) -> None:
        """Count a gap."""
        self.counts[bisect_left(TOKEN_S, gap_s)] += 1
        self.sum_s += gap_s

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds and cumulative counts, as Prometheus wants them."""
        bounds = [*(str(bound) for bound in TOKEN_S), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self.counts)), strict=True))


@dataclass
class Pulse:
    """When the engine's loop was last heard of, and when it last got anywhere (monotonic seconds)."""

    beat_s: float = 0.0
    progress_s: float = 0.0
    done_tokens: int = -1
    stats: dict[str, Any] = field(default_factory=dict)

    def beat(self, stats: dict[str, Any]) -> None:
        """Take a heartbeat."""
        now = time.monotonic()
        done = stats.get("prompt_tokens", 0) + stats.get("generation_tokens", 0) + stats.get("steps", 0)
        if done != self.done_tokens or not (stats.get("num_running", 0) + stats.get("num_waiting", 0)):
            self.progress_s, self.done_tokens = now, done
        self.beat_s, self.stats = now, stats

    def silent_s(self) -> float:
        """Seconds since the loop was heard of, or has had work and done none of it."""
        return time.monotonic() - min(self.beat_s, self.progress_s)

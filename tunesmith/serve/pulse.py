"""Whether the engine's loop lives: its heartbeats, and whether work gets done between them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any


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

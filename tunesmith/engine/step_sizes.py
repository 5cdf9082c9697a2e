"""How many tokens the steps had, counted for the metrics."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from tunesmith.engine.config import STEP_TOKENS
from tunesmith.engine.scheduler import Scheduled


class StepSizes:
    """Steps by the tokens that they computed, and the guesses among them. See `EngineStats`."""

    def __init__(self) -> None:
        self.counts = [0] * (len(STEP_TOKENS) + 1)
        self.num_tokens = self.num_drafts = 0

    def add(self, parts: Sequence[Scheduled]) -> None:
        """A step was launched."""
        num_tokens = 0
        for part in parts:
            num_tokens += part.num_tokens
            self.num_drafts += part.num_drafts > 0
        self.num_tokens += num_tokens
        self.counts[bisect_left(STEP_TOKENS, num_tokens)] += 1

    def stats(self) -> dict[str, Any]:
        """Fields of `EngineStats`."""
        return {
            "step_tokens": tuple(self.counts),
            "step_tokens_sum": self.num_tokens,
            "num_drafts": self.num_drafts,
        }

"""What a caller asks for, and what comes back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from tunesmith.errors import RequestError

FinishReason = Literal["stop", "length", "abort"]
DEFAULT_MAX_TOKENS = 512


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Temperature 0 (the default) is greedy and reproducible.

    max_tokens: new tokens at most; None: 512, or what the context has room for when that is less.
    temperature: divides the logits; 0 takes the most likely token.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the fewest tokens whose probabilities sum to at least this.
    min_p: drop tokens less likely than this share of the most likely one's probability.
    repetition_penalty: divides (multiplies, when negative) the logits of tokens already seen; 1 is none.
    seed: makes sampling reproducible; None draws a fresh one.
    stop: texts that end the answer and are cut from it.
    ignore_eos: go on after the end-of-turn token (speed measurements).
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        else:
            object.__setattr__(self, "stop", tuple(self.stop))
        for name, ok, allowed in self._rules():
            if not ok:
                raise RequestError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

    def _rules(self) -> tuple[tuple[str, bool, str], ...]:
        return (
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0, "above 0"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "between 0 and 2^63 - 1"),
            ("stop", all(isinstance(text, str) and text for text in self.stop), "texts that are not empty"),
        )

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0 or self.top_k == 1


@dataclass(frozen=True)
class Request:
    """One prompt, already tokenised. `max_tokens` is resolved against the context.

    `text_context`: the tokens whose text the answer's text goes on from (a space that a tokenizer would drop at the
    start of a text stays); empty when the answer is a text of its own.
    """

    id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    arrived_s: float
    text_context: tuple[int, ...] = ()

    @property
    def total_tokens(self) -> int:
        """Positions this request may take in the cache at most."""
        return len(self.prompt_ids) + self.max_tokens


@dataclass(frozen=True)
class Timings:
    """Seconds on the wall clock. `tpot_s` is the mean time of a token after the first; None for one token."""

    queued_s: float
    ttft_s: float
    total_s: float
    tpot_s: float | None


@dataclass(frozen=True)
class Completion:
    """An answer. `token_ids` ends with the stop token when there was one; `text` never shows it."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    timings: Timings


@dataclass(frozen=True)
class StepOutput:
    """What one step gave one request: its new text (may be empty) and, at the end, the whole completion."""

    request_id: int
    token_id: int | None
    piece: str
    completion: Completion | None = field(default=None)

"""What a caller asks for, and what comes back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

from tunesmith.errors import RequestError

if TYPE_CHECKING:
    import numpy as np

FinishReason = Literal["stop", "length", "abort", "error"]
StructuredKind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]
DEFAULT_MAX_TOKENS = 512
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class StructuredSpec:
    """What an answer must look like. `value` is the schema, the expression or the grammar as text, or the choices."""

    kind: StructuredKind
    value: str | tuple[str, ...] = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(StructuredKind):
            raise RequestError(f"structured must be one of {', '.join(get_args(StructuredKind))}, got {self.kind!r}")
        if not isinstance(self.value, str):
            object.__setattr__(self, "value", tuple(self.value))
        if (self.kind == "choice") == isinstance(self.value, str):
            raise RequestError(f"structured {self.kind!r} takes {'texts' if self.kind == 'choice' else 'one text'}")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. Temperature 0 (the default) is greedy and reproducible.

    max_tokens: new tokens at most; None: 512, or what the context has room for when that is less.
    min_tokens: new tokens before which nothing ends the answer.
    temperature: divides the logits; 0 takes the most likely token.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the fewest tokens whose probabilities sum to at least this.
    min_p: drop tokens less likely than this share of the most likely one's probability.
    presence_penalty: taken from the logits of tokens that the answer has already.
    frequency_penalty: the same, once for each time the answer has the token.
    repetition_penalty: divides (multiplies, when negative) the logits of tokens already seen; 1 is none.
    seed: makes sampling reproducible, whatever else is in the batch; None draws a fresh one.
    logit_bias: added to the logits of these token ids.
    stop: texts that end the answer and are cut from it.
    stop_token_ids: tokens that end the answer, beside the model's own.
    ignore_eos: go on after the model's own end-of-turn tokens (speed measurements).
    logprobs: the log-probabilities of this many most likely tokens beside every new one; 0: of the new one only.
    prompt_logprobs: the same for the prompt's tokens from the second on.
    skip_special_tokens: leave special tokens out of the text.
    structured: what the answer must look like.
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
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured: StructuredSpec | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        else:
            object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name, ok, allowed in self._rules():
            if not ok:
                raise RequestError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

    def _rules(self) -> tuple[tuple[str, bool, str], ...]:
        logprobs = f"between 0 and {MAX_LOGPROBS}"
        return (
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("min_tokens", 0 <= self.min_tokens <= (self.max_tokens or self.min_tokens), "from 0 to max_tokens"),
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            ("repetition_penalty", math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0, "above 0"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "between 0 and 2^63 - 1"),
            ("logit_bias", all(math.isfinite(b) for b in (self.logit_bias or {}).values()), "finite numbers"),
            ("stop", all(isinstance(text, str) and text for text in self.stop), "texts that are not empty"),
            ("stop_token_ids", all(token >= 0 for token in self.stop_token_ids), "token ids of 0 or more"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, logprobs),
            ("prompt_logprobs", self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= MAX_LOGPROBS, logprobs),
        )

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0 or self.top_k == 1


@dataclass(frozen=True)
class Request:
    """One prompt, already tokenised. `max_tokens` is resolved against the context.

    text_context: the tokens whose text the answer's text goes on from (a space that a tokenizer would drop at the
        start of a text stays); empty when the answer is a text of its own.
    priority: lower goes first; equal ones go by arrival.
    adapter: the name of a loaded adapter; None is the base model.
    cache_salt: requests share cached prefixes only with those of the same salt.
    streams: whether its text is read as it grows; else it may come all at once with the completion, which is cheaper.
    """

    id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    arrived_s: float
    text_context: tuple[int, ...] = ()
    priority: int = 0
    adapter: str | None = None
    cache_salt: str = ""
    streams: bool = True

    @cached_property
    def prompt_tokens(self) -> np.ndarray:
        """The prompt's tokens as int64: made once for all steps that compute a part of them. Not to be changed."""
        import numpy as np  # a server's front imports this module before anything that takes long

        return np.array(self.prompt_ids, dtype=np.int64)

    @property
    def total_tokens(self) -> int:
        """Positions this request may take in the cache at most."""
        return len(self.prompt_ids) + self.max_tokens

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts requests: who is served first is smaller."""
        return self.priority, self.id


@dataclass(frozen=True)
class TokenLogprobs:
    """The natural log-probability of a token, and of the most likely ones at its place, the best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Timings:
    """Seconds on the wall clock. `tpot_s` is the mean time of a token after the first; None for one token."""

    queued_s: float
    ttft_s: float
    total_s: float
    tpot_s: float | None


@dataclass(frozen=True)
class Completion:
    """An answer. `token_ids` ends with the stop token when there was one; `text` never shows it.

    logprobs: one for each of `token_ids`, where they were asked for.
    prompt_logprobs: one for each of the prompt's tokens from the second on; None for the first.
    cached_tokens: tokens of the prompt that were found in the prefix cache.
    stop_reason: the stop text or the stop token (other than the model's own) that ended the answer.
    error: why the answer could not go on, where finish_reason is "error".
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    timings: Timings
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    cached_tokens: int = 0
    stop_reason: str | int | None = None
    error: str | None = None


@dataclass(slots=True)
class StepOutput:
    """What one step gave one request: its new tokens (several with speculation), their text (may be empty) and, at
    the end, the whole completion. logprobs: one for each new token, where they were asked for."""

    request_id: int
    token_ids: list[int]
    piece: str
    completion: Completion | None = None
    logprobs: list[TokenLogprobs] | None = None

    @property
    def token_id(self) -> int | None:
        """The newest token; None where the step gave no token."""
        return self.token_ids[-1] if self.token_ids else None

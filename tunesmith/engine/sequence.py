"""A request on its way: what is computed, what is said, which pages hold it.

all_ids        p p p p p p p p g g g ?          p prompt, g generated, ? on the device only (in_flight)
num_computed   ----------------->               in the cache once everything launched has run
pages          [   page   ][   page   ]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tunesmith.engine.batch import SampledRow
from tunesmith.engine.interfaces import GrammarState
from tunesmith.engine.prefix import PageChain
from tunesmith.engine.request import Request, TokenLogprobs
from tunesmith.engine.text import AnswerText


@dataclass(eq=False)
class Sequence:
    """One request that waits or runs.

    all_ids: prompt and answer, as far as the host knows them.
    num_computed: tokens whose keys and values are in the pages after all launched steps.
    in_flight: tokens that launched steps draw and the host has not read (0 or 1).
    slot: its place among those that run, or None while it waits; `row` is what sampling knows of it there.
    adapter_index: the place of its adapter on the device, -1 for the base model.
    num_tabled: pages that are in the device's table already.
    num_remembered: full pages that the prefix cache was told of.
    num_cached: tokens of the prompt that were found in the prefix cache when it was first admitted.
    num_scored: rows of the prompt whose log-probabilities were launched, where they are asked for.
    drafts: tokens to be verified in the step that is being planned (see interfaces.Drafter).
    was_guessed: sampling's counts of its tokens, if it keeps any, may be of wrong guesses too.
    grammar: its state after all of `all_ids`; None where nothing is asked of the answer.
    num_prompt: tokens of the prompt. limit: tokens of prompt and answer at which it ends.
    may_stop_at: the same below which nothing ends it.
    is_plain: nothing but tokens is asked for: no grammar, no log-probabilities, no stop texts.
    is_scored: log-probabilities of its prompt are asked for.
    is_ready: adapter and grammar are there, so it can be admitted.
    """

    request: Request
    text: AnswerText
    stop_ids: frozenset[int]
    seed: int
    chain: PageChain
    all_ids: list[int]
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    in_flight: int = 0
    slot: int | None = None
    row: SampledRow | None = None
    adapter_index: int = -1
    num_tabled: int = 0
    num_remembered: int = 0
    num_cached: int = 0
    drafts: list[int] = field(default_factory=list)
    was_guessed: bool = True
    grammar: GrammarState | None = None
    is_ready: bool = True
    was_admitted: bool = False
    is_finished: bool = False
    num_scored: int = 0
    stop_reason: str | int | None = None
    request_id: int = field(init=False)
    num_prompt: int = field(init=False)
    limit: int = field(init=False)
    may_stop_at: int = field(init=False)
    is_plain: bool = field(init=False)
    is_scored: bool = field(init=False)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    started_s: float = 0.0
    first_token_s: float = 0.0

    def __post_init__(self) -> None:
        self.request_id = self.request.id
        params = self.request.params
        self.num_prompt = len(self.request.prompt_ids)
        self.is_scored = params.prompt_logprobs is not None
        self.is_plain = params.structured is None and params.logprobs is None and not params.stop and not self.is_scored
        self.limit = self.num_prompt + self.request.max_tokens
        self.may_stop_at = self.num_prompt + params.min_tokens

    @property
    def token_ids(self) -> list[int]:
        """The answer so far (a copy)."""
        return self.all_ids[self.num_prompt :]

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.all_ids) - self.num_prompt

    @property
    def num_tokens(self) -> int:
        """Tokens that exist, those on the device only included."""
        return len(self.all_ids) + self.in_flight

    @property
    def num_missing(self) -> int:
        """Tokens that exist and are not in the pages: 1 while decoding."""
        return len(self.all_ids) + self.in_flight - self.num_computed

    @property
    def is_at_limit(self) -> bool:
        """Whether the token in flight is the last one that is wanted."""
        return len(self.all_ids) + self.in_flight >= self.limit

    @property
    def wants_prompt_scores(self) -> bool:
        """Whether log-probabilities of its prompt are asked for and not all there: then all of it is computed."""
        return self.is_scored and self.num_scored < self.num_prompt - 1

    @property
    def may_draft(self) -> bool:
        """Whether its next tokens may be guessed: a grammar must be able to go back where guesses were wrong."""
        return self.request.params.structured is None or hasattr(self.grammar, "rollback")

    def enter(self, slot: int) -> None:
        """Begin to run in a slot."""
        params = self.request.params
        self.slot = slot
        self.num_tabled = 0
        self.row = SampledRow(
            slot=slot,
            params=params,
            seed=self.seed,
            num_prompt=self.num_prompt,
            seen_ids=tuple(self.all_ids),
            stop_ids=self.stop_ids,
            has_grammar=params.structured is not None,
        )

    def leave(self) -> int:
        """Stop running; the pages have been given back. Returns the slot."""
        assert self.slot is not None
        slot, self.slot, self.row = self.slot, None, None
        self.pages, self.num_computed, self.num_remembered, self.drafts = [], 0, 0, []
        return slot


def adapters_of(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    """The adapters that these requests name."""
    return tuple(sorted({one.request.adapter for one in sequences if one.request.adapter is not None}))

"""One step as the device sees it: plain tensors, built on the host and copied over at once.

    sequence     r0: decodes 1 token     r1: prefills 3            r2: decodes 1 + 2 drafts
    tokens_T     [ -1 - slot ]           [ p0  p1  p2 ]            [ last  d0  d1 ]
    rows         0                       1   2   3                 4   5   6
    starts       0                       1                         4                         7

A token below zero is not known to the host yet: -1 - slot stands for the last token that was sampled for that slot,
which is on the device. `NativeRunner` puts it in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from tunesmith.engine.request import SamplingParams, TokenLogprobs
from tunesmith.kernels.paged_step import HostLengths


@dataclass(frozen=True)
class FreshTail:
    """The last requests of a step, as far as all that they have in the cache is what this step writes.

    lengths: each one's tokens. num_before: requests before them; max_query, max_context: of those, as in StepBatch.
    """

    lengths: tuple[int, ...]
    num_before: int
    max_query: int
    max_context: int


@dataclass(frozen=True)
class StepBatch:
    """What a pass over the model needs: T new tokens of R sequences, of which B rows are sampled.

    tokens_T: i64; below zero: the last sampled token of a slot (above).
    positions_T: i64, each token's place in its sequence.
    slots_T: i64, where its key and value go: page * S + offset; -1: nowhere (padding).
    query_starts_R1: i32 [R + 1], the rows of each sequence.
    context_R: i32, tokens of each sequence that are in the cache after this step.
    block_tables_RP: i32 [R, most pages], each sequence's pages in order; what lies behind its last page is never read.
    max_query, max_context: the largest number of new tokens, and of tokens in the cache, of one sequence. min_query: at
        most the smallest number of new tokens.
    sample_rows_B: i64, the rows whose next token is drawn. A sequence with k drafts has k + 1 of them.
    sample_slots_B: i64, for each sampled row its sequence's slot.
    sample_positions_B: i64, for each sampled row the position of the token that is drawn (the row's own + 1): together
        with the row's seed it decides the noise of the draw.
    sequence_slots: each sequence's slot, R of them, on the host.
    is_decode: every sequence has one new token, and that is sampled (what CUDA graphs are recorded for).
    adapter_T: i32, each token's place among the adapters (-1: the base model); None where no sequence has one.
    token_adapters: the same on the host.
    score_rows, score_targets: i64, rows of prompts whose next token's log-probability is asked for, and those tokens.
    num_scored_top: how many most likely tokens are given beside each of those.
    host: lengths and tables once more, on the host; None where only the device knows them.
    fresh: where its last requests are whole prompts, or the beginnings of some; None also where nobody looked.
    passes: the same tokens as batches of a fixed number of rows, padded, to be run one after the other (batch-invariant
        mode); empty where the batch is run as it is.
    """

    tokens_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    query_starts_R1: Tensor
    context_R: Tensor
    block_tables_RP: Tensor
    max_query: int
    max_context: int
    sample_rows_B: Tensor
    sample_slots_B: Tensor
    sample_positions_B: Tensor
    sequence_slots: Sequence[int]
    is_decode: bool
    adapter_T: Tensor | None = None
    token_adapters: np.ndarray | None = None
    score_rows: Tensor | None = None
    score_targets: Tensor | None = None
    num_scored_top: int = 0
    min_query: int = 1
    fresh: FreshTail | None = None
    host: HostLengths | None = None
    passes: tuple[StepBatch, ...] = ()

    def with_passes(self, passes: tuple[StepBatch, ...]) -> StepBatch:
        """The same step, to be run in these passes."""
        return replace(self, passes=passes)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.tokens_T.shape[0]

    @property
    def num_requests(self) -> int:
        """R; of a recorded step with its rows of padding."""
        return self.context_R.shape[0]


@dataclass(eq=False)
class SampledRow:
    """One sequence as sampling sees it: the same object for as long as the sequence keeps its slot.

    So a step whose rows are the same objects in the same order needs no new tensors. A sequence that comes back after
    a preemption, or takes another's slot, has a new object: what is kept per slot is made anew then.

    slot: below `max_num_seqs`; per-sequence state on the device (last token, counts for penalties) lies there.
    seed: resolved (drawn where the request has none).
    num_prompt: tokens of the prompt; `sample_positions_B - num_prompt` tokens were generated before the one drawn.
    seen_ids: prompt and generated tokens when the sequence entered the slot, the first `num_prompt` of them the
        prompt's: what penalties count from.
    stop_ids: all tokens that end the answer; not to be drawn while fewer than `params.min_tokens` were generated.
    has_grammar: the row is masked by a bitmask in every step (`StepBatch` comes with one row for it).
    drafted: guesses that the row stands behind, which count as seen: an object for this step alone (guesses.py). Rows
        without penalties don't say.
    """

    slot: int
    params: SamplingParams
    seed: int
    num_prompt: int
    seen_ids: Sequence[int]
    stop_ids: frozenset[int]
    has_grammar: bool = False
    drafted: tuple[int, ...] = ()


@dataclass(frozen=True)
class StepResult:
    """What a step gave, on the host.

    tokens: one for each sampled row, in the batch's order; -1 where the row's logits were not numbers.
    logprobs: for each sampled row, None where none were asked for.
    scored: one for each of the batch's `score_rows`.
    """

    tokens: list[int]
    logprobs: Sequence[TokenLogprobs | None] = ()
    scored: Sequence[TokenLogprobs] = ()

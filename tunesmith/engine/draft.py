"""Guesses by a smaller model with a cache of its own: it answers ahead, and the large model says how far it was right.

    all_ids      a b c d e f          what the large model has said
    held         a b c d x            what is in the smaller one's cache: right up to d
    passes       e f -> g'   g' -> h'   h' -> i'        guesses g' h' i'

The smaller model draws with the request's own parameters and noise. Where both models give a token nearly the same
probability they draw the same token, so sampled answers are guessed about as well as greedy ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, cast

import numpy as np

from tunesmith.engine.batch import SampledRow, StepBatch
from tunesmith.engine.batching import HostBatch, to_device
from tunesmith.engine.interfaces import Drafted, Pending, Runner
from tunesmith.engine.pages import PAGE_SLOTS, pages_of
from tunesmith.engine.speculate import Pace


class RunningRequest(Protocol):
    """What guessing needs of a sequence that runs, beside its tokens."""

    request_id: int
    all_ids: list[int]
    slot: int | None
    row: SampledRow | None


@dataclass(eq=False)
class _Held:
    """One request in the smaller model's cache: `ids` are the tokens whose keys and values are there.

    wanted: guesses of this round. target_row: what `row`, its parameters here, was made of.
    """

    pace: Pace
    pages: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    num_right: int = 0
    wanted: int = 0
    slot: int = 0
    target_row: SampledRow | None = None
    row: SampledRow | None = None

    def agree(self, all_ids: Sequence[int]) -> int:
        """How many held tokens are the request's; the others are forgotten, and at least one is left to compute."""
        most = min(len(self.ids), len(all_ids) - 1)
        start = min(self.num_right, most)
        while start < most and self.ids[start] == all_ids[start]:
            start += 1
        del self.ids[start:]
        self.num_right = start
        return start


@dataclass(frozen=True)
class _Part:
    """A request's tokens of one pass. tokens below zero: its last draw, which is on the device."""

    held: _Held
    tokens: list[int]
    start: int


class DraftModel:
    """Guesses by a smaller model.

    Args:
        runner: of the smaller model; its slots are those of the large one, its pages its own.
        max_drafts: guesses of a step at most.
        vocab_size: of the large model: other tokens are not guessed.
        max_tokens: of one pass; a long prompt takes several rounds, in which nothing is guessed for it.
        computes_last: the last guess goes into the cache too, so that every pass has one token of each request
            (what CUDA graphs are recorded for).
    """

    def __init__(
        self,
        runner: Runner,
        max_drafts: int,
        vocab_size: int,
        *,
        max_tokens: int = 8192,
        computes_last: bool = False,
    ) -> None:
        self.runner = runner
        self.max_drafts = max_drafts
        self.vocab_size = min(vocab_size, runner.vocab_size)
        self.max_tokens = max_tokens
        self.computes_last = computes_last
        self._held: dict[int, _Held] = {}

    def propose(self, sequences: Sequence[Drafted]) -> list[list[int]]:
        """For each sequence at most `max_drafts` tokens that may follow its `all_ids`; [] for no guess."""
        helds = [self._prepare(cast(RunningRequest, sequence)) for sequence in sequences]
        first = self._catch_up(sequences, helds)
        able = [part.held for part in first if part.held.wanted]
        drawn: list[tuple[list[_Held], Pending]] = []
        if first:
            batch = self._batch(first, [part.held.wanted > 0 for part in first])
            self.runner.forward(batch)
            if able:
                drawn.append((able, self._draw(batch, able)))
        self._go_on(able, drawn)
        guesses = _collected(drawn, self.vocab_size)
        return [self._taken(held, sequence, guesses) for held, sequence in zip(helds, sequences, strict=True)]

    def forget(self, request_id: int) -> None:
        """The sequence has ended."""
        held = self._held.pop(request_id, None)
        if held is not None:
            self.runner.pages.release_all(held.pages)
            self.runner.release(held.slot)

    def _prepare(self, sequence: RunningRequest) -> _Held:
        """What is held of a sequence, with as many guesses wanted as there is room for."""
        held = self._held.setdefault(sequence.request_id, _Held(Pace(self.max_drafts)))
        assert sequence.row is not None and sequence.slot is not None
        if held.target_row is not sequence.row:
            params = replace(sequence.row.params, logprobs=None, prompt_logprobs=None)
            held.target_row, held.slot = sequence.row, sequence.slot
            held.row = replace(sequence.row, params=params, has_grammar=False)  # of which the smaller one knows nothing
        length = len(sequence.all_ids)
        held.agree(sequence.all_ids)
        room = self.runner.max_model_len - length
        held.wanted = max(0, min(held.pace.look(sequence.all_ids), room))
        needed = pages_of(length + held.wanted) - len(held.pages)
        if held.wanted and needed > self.runner.pages.num_free:
            held.wanted = 0
        elif held.wanted:
            held.pages += [self.runner.pages.take(held.pages[-1] if held.pages else None) for _ in range(needed)]
        return held

    def _catch_up(self, sequences: Sequence[Drafted], helds: Sequence[_Held]) -> list[_Part]:
        """Tokens that are not in the cache yet, within the budget; nothing is guessed for whom that is too little."""
        parts, budget = [], self.max_tokens
        for sequence, held in zip(sequences, helds, strict=True):
            if not held.wanted:
                continue
            start = len(held.ids)
            tokens = sequence.all_ids[start : start + budget]
            if start + len(tokens) < len(sequence.all_ids):
                held.wanted = 0
            if any(token >= self.runner.vocab_size for token in tokens):
                held.wanted = 0
            elif tokens:
                parts.append(_Part(held, tokens, start))
                held.ids += tokens
                budget -= len(tokens)
        return parts

    def _go_on(self, able: list[_Held], drawn: list[tuple[list[_Held], Pending]]) -> None:
        """One token at a time for those that want more guesses; nothing waits for the device."""
        for number in range(1, self.max_drafts + self.computes_last):
            going = [held for held in able if held.wanted + self.computes_last > number]
            if not going:
                return
            parts = [_Part(held, [-1 - held.slot], len(held.ids) + number - 1) for held in going]
            batch = self._batch(parts, [True] * len(going))
            self.runner.forward(batch)
            drawn.append((going, self._draw(batch, going)))

    def _draw(self, batch: StepBatch, helds: Sequence[_Held]) -> Pending:
        return self.runner.sample(batch, [held.row for held in helds if held.row is not None], None)

    def _taken(self, held: _Held, sequence: Drafted, guesses: dict[int, list[int]]) -> list[int]:
        """A sequence's guesses, noted as held as far as their keys and values are."""
        found = guesses.get(id(held), [])
        held.pace.note(sequence.all_ids, found)
        held.num_right = len(held.ids)
        held.ids += found if self.computes_last else found[:-1]
        return found

    def _batch(self, parts: Sequence[_Part], draws: Sequence[bool]) -> StepBatch:
        """The tensors of a pass; of each part that draws, its last row is drawn."""
        counts = np.array([len(part.tokens) for part in parts], dtype=np.int64)
        computed = np.array([part.start for part in parts], dtype=np.int64)
        starts = np.zeros(len(parts) + 1, dtype=np.int64)
        np.cumsum(counts, out=starts[1:])
        owner = np.repeat(np.arange(len(parts)), counts)
        positions = np.arange(starts[-1]) - (starts[:-1] - computed)[owner]
        contexts = computed + counts
        tables = np.zeros((len(parts), pages_of(int(contexts.max()))), dtype=np.int32)
        for row, part in enumerate(parts):
            known = part.held.pages[: tables.shape[1]]
            tables[row, : len(known)] = known
        pages = tables[owner, positions // PAGE_SLOTS].astype(np.int64)
        none = np.zeros(0, dtype=np.int64)
        host = HostBatch(
            tokens=np.array([token for part in parts for token in part.tokens], dtype=np.int64),
            positions=positions,
            slots=pages * PAGE_SLOTS + positions % PAGE_SLOTS,
            starts=starts,
            contexts=contexts,
            tables=tables,
            sequence_slots=np.array([part.held.slot for part in parts], dtype=np.int64),
            sample_rows=(starts[1:] - 1)[np.array(draws, dtype=bool)],
            adapters=None,
            score_rows=none,
            score_targets=none,
            num_scored_top=0,
            is_decode=all(draws) and bool((counts == 1).all()),
        )
        return to_device(host, self.runner.device)


def _collected(drawn: Sequence[tuple[list[_Held], Pending]], vocab_size: int) -> dict[int, list[int]]:
    """Each request's guesses, as many as it wants, up to the first that is no token of the large model."""
    found: dict[int, list[int]] = {}
    ended: set[int] = set()
    for helds, pending in drawn:
        for held, token in zip(helds, pending.wait().tokens, strict=True):
            if not 0 <= token < vocab_size:
                ended.add(id(held))
            own = found.setdefault(id(held), [])
            if id(held) not in ended and len(own) < held.wanted:
                own.append(token)
    return found

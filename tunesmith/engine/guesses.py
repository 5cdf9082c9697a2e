"""Which requests are guessed for in a step, and what its rows must know of the guesses before them.

A row behind a guess is used only if the guess was right, so it may take the guess for a token that was drawn: its
grammar goes on by it (`masks.py`), and a row with penalties counts it as seen. Such a row has counts of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tunesmith.engine.batch import SampledRow
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.interfaces import Drafter
from tunesmith.engine.sampling_state import needs_counts
from tunesmith.engine.scheduler import Scheduled
from tunesmith.engine.sequence import Sequence as Running

MOST_COUNTED = 64
"""Guesses of a step for requests with penalties: the counts of each row behind one are 3 bytes a token of the
vocabulary."""


def take_guesses(drafter: Drafter, running: Sequence[Running], config: EngineConfig) -> int:
    """Ask for guesses, and give each request as many as there is room for; how many there are in all."""
    able = [s for s in running if s.num_missing == 1 and not s.in_flight and s.may_draft]
    for sequence in able:
        _count_anew(sequence)
    spare = config.max_num_batched_tokens - len(running)  # every request has its turn before any guess
    counted, total = MOST_COUNTED, 0
    for sequence, drafts in zip(able, drafter.propose(able), strict=True):
        is_counted = needs_counts(sequence.request.params)
        room = sequence.request.max_tokens - sequence.num_generated - 1
        most = min(room, drafter.max_drafts, spare, counted if is_counted else spare)
        sequence.drafts = list(drafts[: max(0, most)])
        spare -= len(sequence.drafts)
        counted -= len(sequence.drafts) * is_counted
        sequence.was_guessed = bool(sequence.drafts)
        total += len(sequence.drafts)
    return total


def _count_anew(sequence: Running) -> None:
    """After a step with guesses only the host knows what was drawn: a new row is counted from the beginning."""
    if sequence.was_guessed and sequence.row is not None and needs_counts(sequence.request.params):
        sequence.row = replace(sequence.row, seen_ids=tuple(sequence.all_ids))


def behind_guesses(parts: Sequence[Scheduled], rows: list[SampledRow]) -> list[SampledRow]:
    """The rows of a step; those with penalties that stand behind guesses are told of them."""
    first = 0
    for part in parts:
        if part.num_drafts and needs_counts(part.sequence.request.params):
            drafts = tuple(part.sequence.drafts)
            for number in range(1, part.num_rows):
                rows[first + number] = replace(rows[first], drafted=drafts[:number])
        first += part.num_rows
    return rows

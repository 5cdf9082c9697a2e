"""Which tokens the constrained rows of a step may draw, as bitmasks for the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tunesmith.engine.grammar_compile import fill_masks
from tunesmith.engine.interfaces import GrammarState, RollingState
from tunesmith.engine.scheduler import Scheduled
from tunesmith.engine.sequence import Sequence as Running
from tunesmith.engine.structured import draft_masks
from tunesmith.units import ceil_div


def grammar_masks(
    parts: Sequence[Scheduled], vocab_size: int
) -> tuple[np.ndarray | None, list[tuple[Running, Exception]]]:
    """int32 [M, ceil(V / 32)], one row for each sampled row that has a grammar, in the batch's order; None for M = 0.

    All tokens that came before must be known. Also the sequences whose grammar failed, whose rows allow everything:
    they are to be ended before their token is used. So do rows of sequences that have ended already.
    """
    masked = [part for part in parts if part.samples and part.sequence.request.params.structured is not None]
    if not masked:
        return None, []
    masks = np.full((sum(part.num_rows for part in masked), ceil_div(vocab_size, 32)), -1, dtype=np.int32)
    states: list[tuple[int, GrammarState]] = []
    sequences: dict[int, Running] = {}
    failed: list[tuple[Running, Exception]] = []
    first = 0
    for part in masked:
        sequence, rows = part.sequence, masks[first : first + part.num_rows]
        if sequence.grammar is not None and not sequence.is_finished:
            if part.num_drafts:
                failed += _behind_guesses(sequence, rows)
            else:
                states.append((first, sequence.grammar))
                sequences[first] = sequence
        first += part.num_rows
    return masks, failed + [(sequences[row], error) for row, error in fill_masks(states, masks)]


def _behind_guesses(sequence: Running, rows: np.ndarray) -> list[tuple[Running, Exception]]:
    """The rows of a sequence with guesses. Behind one that its grammar does not allow they allow everything: the row
    before can't draw that guess, so nobody asks what comes after it."""
    grammar = sequence.grammar
    assert isinstance(grammar, RollingState)
    try:
        draft_masks(grammar, sequence.drafts[: len(rows) - 1], rows)
    except Exception as error:
        rows.fill(-1)
        return [(sequence, error)]
    return []

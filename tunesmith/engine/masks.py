"""Which tokens the constrained rows of a step may draw, as bitmasks for the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tunesmith.engine.grammar_compile import fill_masks
from tunesmith.engine.scheduler import Scheduled
from tunesmith.engine.sequence import Sequence as Running
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
    states = [
        (row, part.sequence.grammar)
        for row, part in enumerate(masked)
        if part.sequence.grammar is not None and not part.sequence.is_finished
    ]
    return masks, [(masked[row].sequence, error) for row, error in fill_masks(states, masks)]

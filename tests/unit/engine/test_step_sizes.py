"""What the engine counts of its steps' tokens, and of the adapters that requests name."""

from __future__ import annotations

from collections.abc import Callable

from tunesmith.engine.config import STEP_TOKENS
from tunesmith.engine.engine import Engine
from tunesmith.engine.request import SamplingParams


def test_a_step_counts_with_the_tokens_that_it_computes(counting: Callable[..., Engine]) -> None:
    engine = counting(max_num_batched_tokens=8, max_num_seqs=2)
    engine.submit(list(range(1, 21)), SamplingParams(max_tokens=4, temperature=0.0))
    while engine.has_work:
        engine.step()
    stats = engine.stats()
    # The prompt in pieces of 8, 8 and 4, then a token for each of the three that follow the first.
    assert stats.step_tokens_sum == 20 + 3 and sum(stats.step_tokens) == stats.steps == 6
    assert dict(zip(STEP_TOKENS, stats.step_tokens, strict=False))[1] == 3
    assert stats.step_tokens[STEP_TOKENS.index(8)] == 3 and stats.num_drafts == 0
    assert stats.running_adapters == stats.waiting_adapters == () and stats.page_slots == 16

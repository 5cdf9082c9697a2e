"""The arrays of a step: token by token, what the plan says."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tunesmith.engine.batching import BatchBuilder
from tunesmith.engine.pages import PAGE_SLOTS, pages_of
from tunesmith.engine.prefix import PageChain
from tunesmith.engine.request import Request, SamplingParams
from tunesmith.engine.scheduler import Scheduled, StepPlan
from tunesmith.engine.sequence import Sequence
from tunesmith.engine.text import AnswerText

SLOTS, LONGEST = 12, 300


def part_of(choice: random.Random, slot: int) -> Scheduled:
    """A piece of a prompt, its end, one token of an answer, or one with guesses; the last known token may be drawn."""
    prompt = tuple(choice.randrange(1000) for _ in range(choice.randint(1, 120)))
    answer = [choice.randrange(1000) for _ in range(choice.choice([0, 0, 3, 40]))]
    request = Request(slot + 1, prompt, SamplingParams(), 100, 0.0)
    ids = [*prompt, *answer]
    sequence = Sequence(request, AnswerText(None, ()), frozenset(), 0, PageChain(), ids)
    sequence.in_flight = choice.choice([0, 1]) if answer else 0
    sequence.adapter_index = choice.choice([-1, 2])
    sequence.enter(slot)
    known = len(ids) + sequence.in_flight
    start = choice.choice([0, choice.randrange(known), known - 1])
    num = choice.randint(1, known - start)
    if start + num == known and not sequence.in_flight:
        sequence.drafts = [choice.randrange(1000) for _ in range(choice.choice([0, 0, 2]))]
    pages = pages_of(start + num + len(sequence.drafts))
    sequence.pages = [slot * 100 + page for page in choice.sample(range(100), pages)]
    return Scheduled(sequence, start, num + len(sequence.drafts), start + num == known, len(sequence.drafts))


def token_of(part: Scheduled, position: int) -> int:
    sequence = part.sequence
    if position < len(sequence.all_ids):
        return sequence.all_ids[position]
    if part.num_drafts:
        return sequence.drafts[position - len(sequence.all_ids)]
    assert sequence.slot is not None
    return -1 - sequence.slot


@pytest.mark.parametrize("seed", range(40))
def test_every_token_has_its_number_its_position_and_its_place(seed: int) -> None:
    choice = random.Random(seed)
    slots = choice.sample(range(SLOTS), choice.randint(1, SLOTS))
    plan = StepPlan([part_of(choice, slot) for slot in slots])
    batch, rows = BatchBuilder(SLOTS, LONGEST, torch.device("cpu")).build(plan)
    places = [(part, part.start + index) for part in plan.scheduled for index in range(part.num_tokens)]
    assert batch.tokens_T.tolist() == [token_of(*place) for place in places]
    assert batch.positions_T.tolist() == [position for _, position in places]
    pages = [part.sequence.pages[position // PAGE_SLOTS] for part, position in places]
    offsets = [position % PAGE_SLOTS for _, position in places]
    assert batch.slots_T.tolist() == [PAGE_SLOTS * page + at for page, at in zip(pages, offsets, strict=True)]
    adapters = [part.sequence.adapter_index for part, _ in places]
    if max(adapters) >= 0:
        assert batch.adapter_T is not None and batch.adapter_T.tolist() == adapters
    starts = np.cumsum([0] + [part.num_tokens for part in plan.scheduled])
    assert batch.query_starts_R1.tolist() == starts.tolist()
    assert batch.context_R.tolist() == [part.start + part.num_tokens for part in plan.scheduled]
    for part, table in zip(plan.scheduled, batch.block_tables_RP.tolist(), strict=True):
        assert table[: len(part.sequence.pages)] == part.sequence.pages
    drawn = [
        (end - part.num_rows + index, part)
        for part, end in zip(plan.scheduled, starts[1:].tolist(), strict=True)
        for index in range(part.num_rows)
    ]
    assert batch.sample_rows_B.tolist() == [row for row, _ in drawn]
    assert batch.sample_slots_B.tolist() == [part.sequence.slot for _, part in drawn]
    assert batch.sample_positions_B.tolist() == [places[row][1] + 1 for row, _ in drawn]
    assert [row.slot for row in rows] == [part.sequence.slot for _, part in drawn]
    assert (batch.max_query, batch.min_query) == (max(np.diff(starts)), min(np.diff(starts)))


def test_the_prompt_of_a_request_is_not_lent_out() -> None:
    """A lone prompt's tokens were a view of what the request keeps for later steps."""
    choice = random.Random(1)
    part = part_of(choice, 0)
    sequence = part.sequence
    part = Scheduled(sequence, 0, sequence.num_prompt, False)
    sequence.pages = list(range(pages_of(sequence.num_prompt)))
    batch, _ = BatchBuilder(1, LONGEST, torch.device("cpu")).build(StepPlan([part]))
    batch.tokens_T.zero_()
    assert sequence.request.prompt_tokens.tolist() == list(sequence.request.prompt_ids)

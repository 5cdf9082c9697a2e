"""The pass for a CPU has the decoder's own hidden states, whatever sequences do in their slots and pages."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from tunesmith.checkpoint.load import load_decoder
from tunesmith.engine.attend import PagedAttention
from tunesmith.engine.batch import StepBatch
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.cpu_pass import CpuPass
from tunesmith.engine.engine import Engine
from tunesmith.engine.pages import PAGE_SLOTS, PagedCache
from tunesmith.engine.request import SamplingParams
from tunesmith.engine.runner import NativeRunner
from tunesmith.model.decoder import Decoder
from tunesmith.model.layers import Linear
from tunesmith.units import ceil_div

SLOTS, PAGES, LONGEST = 5, 40, 120


def step_of(parts: list[tuple[int, int, int, list[int]]], draw: random.Random) -> StepBatch:
    """parts: slot, tokens before, new tokens, pages."""
    counts = [new for _, _, new, _ in parts]
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    contexts = [before + new for _, before, new, _ in parts]
    positions = [p for _, before, new, _ in parts for p in range(before, before + new)]
    slots = [
        pages[p // PAGE_SLOTS] * PAGE_SLOTS + p % PAGE_SLOTS
        for _, before, new, pages in parts
        for p in range(before, before + new)
    ]
    tables = torch.zeros(len(parts), ceil_div(max(contexts), PAGE_SLOTS), dtype=torch.int32)
    for row, (context, (*_, pages)) in enumerate(zip(contexts, parts, strict=True)):
        number = ceil_div(context, PAGE_SLOTS)
        tables[row, :number] = torch.tensor(pages[:number], dtype=torch.int32)
    return StepBatch(
        tokens_T=torch.tensor([draw.randrange(250) for _ in positions]),
        positions_T=torch.tensor(positions),
        slots_T=torch.tensor(slots),
        query_starts_R1=torch.tensor(starts, dtype=torch.int32),
        context_R=torch.tensor(contexts, dtype=torch.int32),
        block_tables_RP=tables,
        max_query=max(counts),
        max_context=max(contexts),
        sample_rows_B=torch.tensor(starts[1:]) - 1,
        sample_slots_B=torch.tensor([slot for slot, *_ in parts]),
        sample_positions_B=torch.tensor(contexts),
        sequence_slots=[slot for slot, *_ in parts],
        is_decode=all(count == 1 for count in counts),
    )


def history(seed: int, num_steps: int = 30) -> Iterator[StepBatch]:
    """Sequences that come, answer, take several tokens at once, lose some again, end, and leave slots and pages."""
    draw = random.Random(seed)
    free = list(range(PAGES))
    running: dict[int, tuple[int, list[int]]] = {}
    for number in range(num_steps):
        for slot in [s for s, (length, _) in running.items() if length > LONGEST - 30 or draw.random() < 0.04]:
            free += running.pop(slot)[1]
        if (len(running) < SLOTS and draw.random() < 0.3) or not running:
            running[draw.choice([s for s in range(SLOTS) if s not in running])] = (0, [])
        parts = []
        for slot in draw.sample(sorted(running), len(running)) if number % 3 else sorted(running):
            length, pages = running[slot]
            new = draw.choice([1, 17, 30]) if length == 0 else draw.choice([1] * 30 + [3])
            # Guesses that were wrong, or a page's content that another sequence shares.
            length -= draw.choice([0] * 20 + [min(2, length)])
            while len(pages) * PAGE_SLOTS < length + new:
                pages.append(free.pop(draw.randrange(len(free))))
            parts.append((slot, length, new, list(pages)))
            running[slot] = (length + new, pages)
        yield step_of(parts, draw)


def cache_of(decoder: Decoder, dtype: torch.dtype) -> PagedCache:
    cache = PagedCache(decoder.config, PAGES, dtype=dtype, device=torch.device("cpu"))
    for pages in (*cache.keys, *cache.values):
        pages.fill_(float("nan"))
    return cache


def compare(decoder: Decoder, run: CpuPass, seed: int, limit: float, dtype: torch.dtype = torch.float32) -> None:
    one, other = cache_of(decoder, dtype), cache_of(decoder, dtype)
    with torch.inference_mode():
        for batch in history(seed):
            wanted = decoder(batch.tokens_T, batch.positions_T, PagedAttention(one, batch))
            found = run(batch.tokens_T, batch.positions_T, PagedAttention(other, batch))
            torch.testing.assert_close(found, wanted, rtol=limit, atol=limit)
            torch.testing.assert_close(run.logits(found), decoder.logits(wanted), rtol=limit, atol=limit)


def load(tiny_model_dir, family: str, dtype: torch.dtype = torch.float32, **changes) -> Decoder:
    return load_decoder(tiny_model_dir(family, **changes), device="cpu", dtype=dtype).eval()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("packs", [True, False])
def test_equals_the_decoder(family: str, packs: bool, tiny_model_dir) -> None:
    decoder = load(tiny_model_dir, family)
    run = CpuPass(decoder, SLOTS, LONGEST, packs=packs)
    compare(decoder, run, seed=len(family), limit=1e-5)
    assert run.held is not None and run.held.capacity[0] > 0


def test_rows_follow_their_pages_whatever_happens(tiny_model_dir) -> None:
    decoder = load(tiny_model_dir, "llama")
    for seed in range(9, 14):
        compare(decoder, CpuPass(decoder, SLOTS, LONGEST, packs=False), seed, 1e-5)


def test_a_sequence_that_takes_over_slot_and_pages_has_a_row_of_its_own(tiny_model_dir) -> None:
    decoder, draw = load(tiny_model_dir, "llama"), random.Random(0)
    run = CpuPass(decoder, SLOTS, LONGEST, packs=True)
    one, other = cache_of(decoder, torch.float32), cache_of(decoder, torch.float32)
    # The second sequence's prompt is as long as the first one was when it ended.
    history = [(0, 0, 20, [3, 1]), (0, 20, 1, [3, 1]), (0, 0, 21, [3, 1]), (0, 21, 1, [3, 1])]
    with torch.inference_mode():
        for part in history:
            batch = step_of([part], draw)
            wanted = decoder(batch.tokens_T, batch.positions_T, PagedAttention(one, batch))
            found = run(batch.tokens_T, batch.positions_T, PagedAttention(other, batch))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_page_that_another_has_filled_is_read_anew(tiny_model_dir) -> None:
    """A row was held for as long as its slot's next sequence began with the same pages and as many tokens as the last
    one ended with. These may hold another text: here the first sequence leaves slot 0 and page 0 with 16 tokens, the
    third fills that page from slot 1, and the last one shares it from slot 0 and has one token of its own."""
    config = EngineConfig(max_model_len=64, max_num_seqs=3)
    prefix = list(range(40, 56))

    def answers(*requests: tuple[list[int], int, int | None]) -> list[int]:
        """Prompt, tokens of the answer, and steps before the next request (None: until all is done)."""
        engine = Engine(NativeRunner(load(tiny_model_dir, "llama", initializer_range=0.2), config, 3), config=config)
        said: dict[int, list[int]] = {}
        last = -1
        for prompt, length, num_steps in requests:
            last = engine.submit(prompt, SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True))
            while engine.has_work and num_steps != 0:
                for output in engine.step():
                    said.setdefault(output.request_id, []).extend(output.token_ids)
                num_steps = None if num_steps is None else num_steps - 1
        return said[last]

    before = [(list(range(100, 110)), 7, 0), (list(range(120, 140)), 13, None), ([*prefix, 1], 12, 3)]
    wanted = ([*prefix, 2], 6, None)
    assert answers(*before, wanted) == answers(wanted)


def test_bfloat16_is_as_near_to_the_truth_as_the_decoder(tiny_model_dir) -> None:
    decoder = load(tiny_model_dir, "qwen2", torch.bfloat16)
    compare(decoder, CpuPass(decoder, SLOTS, LONGEST, packs=True), 0, 0.06, torch.bfloat16)


def test_parameters_keep_shape_and_values(tiny_model_dir) -> None:
    decoder = load(tiny_model_dir, "qwen2")
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    compare(decoder, CpuPass(decoder, SLOTS, LONGEST, packs=True), 1, 1e-5)
    after = decoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_live_model_is_seen_as_it_is(tiny_model_dir) -> None:
    decoder = load(tiny_model_dir, "llama")
    run = CpuPass(decoder, SLOTS, LONGEST, packs=False)
    compare(decoder, run, 2, 1e-5)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1.1)
    compare(decoder, run, 3, 1e-5)


def test_a_module_put_in_anothers_place_is_called(tiny_model_dir) -> None:
    decoder = load(tiny_model_dir, "llama")
    run = CpuPass(decoder, SLOTS, LONGEST, packs=True)
    compare(decoder, run, 4, 1e-5)
    block = decoder.blocks[1]

    class Doubled(nn.Module):
        def __init__(self, base: Linear) -> None:
            super().__init__()
            self.base, self.in_features, self.parts = base, base.in_features, base.parts

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.base(x)

    block.attention.qkv = Doubled(block.attention.qkv)
    compare(decoder, run, 5, 1e-5)


def test_rows_that_would_be_mostly_empty_are_not_held(tiny_model_dir) -> None:
    decoder = load(tiny_model_dir, "llama")
    run = CpuPass(decoder, SLOTS, LONGEST, packs=True)
    cache, draw = cache_of(decoder, torch.float32), random.Random(0)
    with torch.inference_mode():
        for parts in ([(4, 0, 1, [3])], [(0, 0, 1, [1]), (1, 0, 17, [2, 5])]):
            batch = step_of(parts, draw)  # type: ignore[arg-type]
            run(batch.tokens_T, batch.positions_T, PagedAttention(cache, batch))
    assert run.held is not None and run.held.capacity == (0, 0)

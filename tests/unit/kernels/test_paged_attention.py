"""Attention over pages: the reference against plain attention, every other way against the reference."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from paged_batches import SLOTS, PagedBatch, make_batch

from tunesmith.kernels.paged_attention import paged_attention
from tunesmith.model.attention import attend_one

MIXED = ([1, 20, 3, 1, 50], [5, 20, 300, 17, 80])
DECODE = ([1, 1, 1, 1], [5, 130, 300, 1])
HEADS = [(4, 2, 16), (7, 1, 24), (3, 3, 8)]


def run(batch: PagedBatch, window: int | None = None, *, slack: int = 0, invariant: bool = False) -> torch.Tensor:
    out = paged_attention(
        batch.query,
        batch.keys,
        batch.values,
        batch.tables,
        batch.starts,
        batch.context,
        max_query=batch.max_query,
        max_context=batch.max_context + slack,
        window=window,
        key_scales_PK=batch.key_scales,
        value_scales_PK=batch.value_scales,
        invariant=invariant,
    )
    return out[: int(batch.starts[-1])]


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("heads", HEADS)
def test_the_reference_is_attention_of_each_request(heads: tuple[int, int, int], window: int | None) -> None:
    batch = make_batch(*MIXED, heads, torch.float32)
    expected = []
    for request, context in enumerate(batch.context.tolist()):
        start, end = batch.starts[request : request + 2].tolist()
        places = [
            int(batch.tables[request, position // SLOTS]) * SLOTS + position % SLOTS for position in range(context)
        ]
        key, value = batch.keys.flatten(0, 1)[places], batch.values.flatten(0, 1)[places]
        expected.append(attend_one(batch.query[start:end], key, value, window))
    torch.testing.assert_close(batch.truth(window), torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 30, 1000])
@pytest.mark.parametrize("shape", [MIXED, DECODE, ([1], [33]), ([7], [33]), ([40], [40]), ([1, 1, 1], [64, 64, 64])])
@pytest.mark.parametrize("heads", HEADS)
def test_what_a_cpu_computes_is_the_reference(
    heads: tuple[int, int, int], shape: tuple[list[int], list[int]], window: int | None, dtype: torch.dtype
) -> None:
    batch = make_batch(*shape, heads, dtype)
    limit = 2e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(run(batch, window), batch.truth(window), rtol=limit, atol=limit)


@pytest.mark.parametrize("shape", [MIXED, DECODE])
def test_fp8_pages_on_a_cpu(shape: tuple[list[int], list[int]]) -> None:
    batch = make_batch(*shape, (4, 2, 16), torch.float32, fp8=True)
    torch.testing.assert_close(run(batch), batch.truth(), rtol=1e-5, atol=1e-5)


def test_the_output_can_be_given_and_scores_be_scaled() -> None:
    batch = make_batch(*MIXED, (4, 2, 16), torch.float32)
    out = torch.empty_like(batch.query)
    arguments = (batch.query, batch.keys, batch.values, batch.tables, batch.starts, batch.context)
    options = {"max_query": batch.max_query, "max_context": batch.max_context, "window": None}
    assert paged_attention(*arguments, **options, out=out, scale=0.0) is out  # type: ignore[arg-type]
    # Every key has the same weight.
    first = batch.values[batch.tables[0, 0].long(), :5].mean(0)
    torch.testing.assert_close(out[0], first.repeat_interleave(2, 0))


KERNEL = """
import sys
sys.path.insert(0, TESTS)
import torch
from paged_batches import make_batch
from tunesmith.kernels.paged_attention_operator import paged_attention_operator
from tunesmith.kernels import paged_attention_tiles as tiles
from tunesmith.kernels import paged_attention_triton as kernels
# Short contexts and few requests go where long ones and many do.
tiles.INVARIANT_SPLIT, tiles.LEAST_SPLIT, kernels.REQUESTS_AT_ONCE.value = 64, 32, 4
tolerance = {torch.float32: 5e-6, torch.float16: 3e-3}
def run(batch, window=None, invariant=False, slack=0, arrivals=None):
    out = torch.full(batch.query.shape, float("nan"), dtype=batch.query.dtype)
    paged_attention_operator(
        batch.query, batch.keys, batch.values, batch.tables, batch.starts, batch.context, batch.key_scales,
        batch.value_scales, out, batch.max_query, batch.max_context + slack, window, batch.query.shape[2] ** -0.5,
        invariant, arrivals, int(batch.starts.diff().min()))
    assert arrivals is None or not arrivals.any()
    return out[: int(batch.starts[-1])]
def check(counts, contexts, heads, dtype, window=None, fp8=False, invariant=False, arrivals=None):
    batch = make_batch(counts, contexts, heads, dtype, fp8=fp8)
    limit = tolerance[dtype]
    mine = run(batch, window, invariant, arrivals=arrivals)
    torch.testing.assert_close(mine, batch.truth(window), rtol=limit, atol=limit)
    return batch, mine
wide, half = torch.float32, torch.float16
decode, mixed = ([1, 1, 0, 1], [5, 130, 0, 200]), ([1, 20, 3], [5, 20, 130])
check(*decode, (4, 2, 16), wide)
check(*decode, (2, 1, 8), half, 30)
check(*mixed, (7, 1, 24), half)
check([1, 30], [5, 90], (4, 2, 16), wide, 30)
check([1, 3], [5, 20], (20, 1, 8), wide)
# The program that comes last joins the parts; with more requests than counters a second kernel does.
check(*decode, (4, 2, 16), wide, arrivals=torch.zeros(8, dtype=torch.int32))
tiles.JOINED_VALUES = 64  # several rounds
check([1, 2], [150, 250], (3, 1, 8), half, 90, arrivals=torch.zeros(2, dtype=torch.int32))
check([1, 1, 1], [5, 130, 90], (2, 1, 8), wide, arrivals=torch.zeros(2, dtype=torch.int32))
check([17, 18], [17, 20], (1, 1, 8), wide)
check([1, 20], [20, 40], (2, 1, 16), wide, fp8=True)
# More requests than are looked at at once.
check([1, 18, 1, 1, 18, 1], [3, 18, 3, 3, 18, 4], (2, 1, 8), wide)
# A recorded step: rows and requests of padding behind, laid out for the most that there may be.
for window, fp8 in ((None, False), (30, False), (None, True)):
    batch = make_batch([1, 20, 3, 18], [50, 20, 130, 40], (2, 1, 16), wide, fp8=fp8)
    truth, total, empty = batch.truth(window), int(batch.starts[-1]), [1] * 6
    rows = torch.full((64, *batch.query.shape[1:]), float("nan"))
    rows[:total] = batch.query[:total]
    starts = torch.tensor([*batch.starts.tolist(), *(total for _ in empty)], dtype=torch.int32)
    context = torch.tensor([*batch.context.tolist(), *empty], dtype=torch.int32)
    tables = torch.cat([batch.tables, torch.full((6, batch.tables.shape[1]), -7, dtype=torch.int32)])
    out, arrivals = torch.full_like(rows, 5.0), torch.zeros(20, dtype=torch.int32)
    paged_attention_operator(rows, batch.keys, batch.values, tables, starts, context, batch.key_scales,
        batch.value_scales, out, 64, 500, window, 0.25, False, arrivals, 1)
    torch.testing.assert_close(out[:total], truth, rtol=5e-6, atol=5e-6)
    assert (out[total:] == 5.0).all() and not arrivals.any()
# The same bits whatever is beside, however much is computed at once, however long contexts might be.
for window in (None, 70):
    batch, mine = check([1, 40], [90, 140], (4, 1, 16), wide, window, invariant=True)
    assert torch.equal(run(batch, window, True, 300), mine)
    alone = batch.of(0)
    assert torch.equal(run(alone, window, True), mine[:1])
    alone = batch.of(1)
    alone.query, alone.starts = alone.query[-1:], torch.tensor([0, 1], dtype=torch.int32)
    assert torch.equal(run(alone, window, True, 100), mine[-1:])
batch = make_batch([1, 20], [5, 30], (2, 1, 16), wide)
out = torch.empty_like(batch.query)
torch.library.opcheck(paged_attention_operator, (
    batch.query, batch.keys, batch.values, batch.tables, batch.starts, batch.context, None, None, out, 20, 30, None,
    0.25, False, None), test_utils=("test_schema", "test_faketensor"))
"""


def test_kernels_equal_the_reference_under_tritons_interpreter(check_interpreted: Callable[[str], None]) -> None:
    """The interpreter can't multiply in bfloat16."""
    check_interpreted(KERNEL.replace("TESTS", repr(str(Path(__file__).parent))))


def test_contexts_are_cut_where_requests_are_few_or_one_is_very_long() -> None:
    from tunesmith.kernels.paged_attention_tiles import joins_inside, splits

    assert splits(1, 4, 2048, 132) == (16, 128)
    assert splits(1, 4, 131_072, 132) == (64, 128)
    assert splits(16, 4, 2048, 132) == (16, 128)
    assert splits(64, 4, 8192, 132) == (16, 128)
    assert splits(66, 4, 2048, 132) == splits(256, 8, 600, 132) == (1, 2048)
    assert splits(256, 4, 4096, 132) == (2, 2048)
    assert splits(256, 4, 131_072, 132) == (8, 2048)
    assert splits(0, 4, 10, 132) == (1, 128)
    assert joins_inside(16, 2, 128)
    assert not joins_inside(16, 8, 128)
    assert not joins_inside(1, 2, 128)

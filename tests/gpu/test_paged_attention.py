"""Attention over pages on a GPU: the kernels against plain torch, bits that do not depend on the batch, graphs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "kernels"))
from paged_batches import SLOTS, PagedBatch, make_batch

from tunesmith.kernels.add_rms_norm import add_rms_norm_
from tunesmith.kernels.fp8 import has_fp8
from tunesmith.kernels.fp8_weight import FP8
from tunesmith.kernels.gemv import float_product
from tunesmith.kernels.heads_to_pages import HeadsLayout, heads_to_pages
from tunesmith.kernels.kv_cache import write_kv, write_kv_reference
from tunesmith.kernels.launch import overlapped
from tunesmith.kernels.nf4 import use_kernel
from tunesmith.kernels.paged_attention import paged_attention
from tunesmith.kernels.paged_attention_fresh import SEEN, attend_fresh, pays_fresh
from tunesmith.kernels.rope import rope_tables_half

pytestmark = pytest.mark.gpu
MIXED = ([1, 20, 3, 1, 500, 0, 129], [5, 20, 3000, 1700, 800, 0, 129])
DECODE = ([1] * 9, [5, 130, 3000, 1, 16, 17, 512, 513, 2048])
HEADS = [(28, 4, 128), (16, 8, 128), (14, 2, 64), (32, 32, 96), (20, 4, 80), (8, 1, 256), (24, 1, 64)]


def run(
    batch: PagedBatch,
    window: int | None = None,
    slack: int = 0,
    invariant: bool = False,
    arrivals: Tensor | None = None,
) -> Tensor:
    out = torch.full(batch.query.shape, float("nan"), dtype=batch.query.dtype, device="cuda")
    paged_attention(
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
        out=out,
        invariant=invariant,
        arrivals=arrivals,
    )
    return out[: int(batch.starts[-1])]


def assert_near(batch: PagedBatch, mine: Tensor, window: int | None = None) -> None:
    limit = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[mine.dtype]
    if batch.key_scales is not None:
        limit = max(limit, 4e-2)
    scale = 1.0 if batch.value_scales is None else 8.0
    torch.testing.assert_close(mine / scale, batch.truth(window) / scale, rtol=limit, atol=limit)


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [*((heads, torch.bfloat16) for heads in HEADS), (HEADS[0], torch.float16), (HEADS[2], torch.float32)],
)
def test_the_kernels_equal_the_reference(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert use_kernel(torch.device("cuda"))
    for shape in (DECODE, MIXED):
        for window in (None, 300):
            batch = make_batch(*shape, heads, dtype, device="cuda")
            assert_near(batch, run(batch, window), window)
            assert_near(batch, run(batch, window, 9000), window)
        assert_near(batch, run(batch, invariant=True))


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [((28, 4, 128), torch.bfloat16), ((14, 2, 64), torch.float16), ((14, 2, 64), torch.float32)],
)
def test_pages_of_fp8(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    if not has_fp8("cuda"):
        pytest.skip("this GPU has no fp8")
    for shape in (DECODE, MIXED):
        batch = make_batch(*shape, heads, dtype, fp8=True, device="cuda")
        assert_near(batch, run(batch))
        assert_near(batch, run(batch, invariant=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("window", [None, 700])
def test_the_same_bits_whatever_is_in_the_batch(window: int | None, dtype: torch.dtype) -> None:
    batch = make_batch(*MIXED, (28, 4, 128), dtype, device="cuda")
    mine = run(batch, window, invariant=True)
    for request in (0, 1, 2, 3, 4, 6):
        start, end = batch.starts[request : request + 2].tolist()
        alone = batch.of(request)
        assert torch.equal(run(alone, window, 5000, invariant=True), mine[start:end]), request
        # The last token alone: the others came from the cache.
        alone.query, alone.starts = alone.query[-1:], torch.tensor([0, 1], dtype=torch.int32, device="cuda")
        assert torch.equal(run(alone, window, invariant=True), mine[end - 1 : end]), request


@pytest.mark.parametrize("heads", [(28, 4, 128), (16, 8, 128), (8, 1, 256)])
def test_parts_joined_by_the_program_that_ends_last(heads: tuple[int, int, int]) -> None:
    """Again and again, beside what the kernel of its own makes of the same parts: whoever comes last joins all."""
    arrivals = torch.zeros(1000, dtype=torch.int32, device="cuda")
    for shape in (DECODE, ([1], [800]), ([1] * 64, [700 + number for number in range(64)])):
        batch = make_batch(*shape, heads, torch.bfloat16, device="cuda")
        joined = run(batch)
        for _ in range(50):
            found = run(batch, arrivals=arrivals)
            torch.testing.assert_close(found, joined, rtol=1e-2, atol=1e-3)
            assert not bool(arrivals.any())
        assert_near(batch, found)


def test_many_requests() -> None:
    contexts = torch.randint(1, 900, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    counts = [1 if number % 7 else min(context, 40) for number, context in enumerate(contexts)]
    batch = make_batch(counts, contexts, (8, 2, 64), torch.bfloat16, device="cuda")
    assert_near(batch, run(batch))


def test_a_step_recorded_once_serves_other_contexts() -> None:
    batch = make_batch(*DECODE, (28, 4, 128), torch.bfloat16, device="cuda")
    arrivals = torch.zeros(100, dtype=torch.int32, device="cuda")
    run_for_graph(batch, arrivals)
    side = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
        out = run_for_graph(batch, arrivals)
    batch.context.copy_(batch.context.flip(0).clamp(max=512))
    batch.tables.copy_(batch.tables[2:3].expand_as(batch.tables))
    for _ in range(3):
        graph.replay()
        assert_near(batch, out[: int(batch.starts[-1])])


def run_for_graph(batch: PagedBatch, arrivals: Tensor) -> Tensor:
    return paged_attention(
        batch.query,
        batch.keys,
        batch.values,
        batch.tables,
        batch.starts,
        batch.context,
        max_query=1,
        max_context=4000,
        window=None,
        arrivals=arrivals,
    )


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("fp8", [False, True])
def test_launches_that_begin_early_equal_the_reference(
    heads: tuple[int, int, int], window: int | None, fp8: bool
) -> None:
    """One request, several, many; of prompts too; parts joined by a kernel or by the program that ends last."""
    if fp8 and not has_fp8("cuda"):
        pytest.skip("this GPU has no fp8")
    arrivals = torch.zeros(100, dtype=torch.int32, device="cuda")
    few = ([1], [800]), ([1], [1]), ([2], [130]), ([1, 0, 1], [129, 40, 1500])
    for shape in (*few, DECODE, MIXED, ([1] * 90, list(range(1, 1800, 20)))):
        batch = make_batch(*shape, heads, torch.bfloat16, fp8=fp8, device="cuda")
        for counters in (None, arrivals):
            truth = run(batch, window, 9000, arrivals=counters)
            torch.cuda.synchronize()
            with overlapped():
                found = run(batch, window, 9000, arrivals=counters)
            assert_near(batch, found, window)
            assert torch.equal(found, truth)


LAYERS, WIDTH, MOST_PAGES = 6, 1024, 60


@dataclass
class Step:
    """What a recorded chain reads: filled anew for every replay. A last row of padding writes nowhere."""

    first: Tensor
    positions: Tensor
    slots: Tensor
    contexts: Tensor
    tables: Tensor

    def fill(self, generator: torch.Generator) -> None:
        """Other tokens of other requests, each with other pages."""
        num, most = len(self.contexts), MOST_PAGES * SLOTS
        contexts = torch.randint(1, most + 1, (num,), generator=generator)
        contexts[torch.rand(num, generator=generator) < 0.3] = most
        tables = (torch.randperm(num * MOST_PAGES, generator=generator) + 1).view(num, MOST_PAGES)
        last = contexts - 1
        slots = tables.gather(1, (last // SLOTS)[:, None])[:, 0] * SLOTS + last % SLOTS
        if num > 1:
            contexts[-1], slots[-1], tables[-1] = 1, -1, 0
        self.first.copy_(torch.randn(self.first.shape, generator=generator))
        self.positions.copy_(contexts - 1)
        self.slots.copy_(slots)
        self.contexts.copy_(contexts)
        self.tables.copy_(tables)


def empty_step(num: int) -> Step:
    first = torch.zeros(num, WIDTH, dtype=torch.bfloat16, device="cuda")
    positions, slots = (torch.zeros(num, dtype=torch.int64, device="cuda") for _ in range(2))
    contexts = torch.ones(num, dtype=torch.int32, device="cuda")
    return Step(first, positions, slots, contexts, torch.zeros(num, MOST_PAGES, dtype=torch.int32, device="cuda"))


@pytest.mark.parametrize("num", [1, 3, 16])
@pytest.mark.parametrize(("heads", "normed"), [((28, 4, 128), False), ((16, 8, 128), True), ((14, 2, 64), False)])
def test_a_chain_that_begins_early_has_the_same_bits(heads: tuple[int, int, int], normed: bool, num: int) -> None:
    """product | heads_to_pages | attention | product | norm, recorded and replayed with other contents every time.

    New keys and values are NaN until their launch has written them: who reads too early shows it.
    """
    generator = torch.Generator().manual_seed(num)
    num_heads, num_kv_heads, head_dim = heads
    draw = lambda *shape: torch.randn(*shape, generator=generator).bfloat16().cuda()  # noqa: E731
    products = [
        (draw((num_heads + 2 * num_kv_heads) * head_dim, WIDTH) * 0.03, draw(WIDTH, num_heads * head_dim) * 0.03)
        for _ in range(LAYERS)
    ]
    pages = [[draw(num * MOST_PAGES + 1, SLOTS, num_kv_heads, head_dim) for _ in range(2)] for _ in range(LAYERS)]
    weights = (draw(head_dim).abs(), draw(head_dim).abs()) if normed else (None, None)
    ones, inverse = torch.ones(WIDTH, device="cuda", dtype=torch.bfloat16), torch.rand(head_dim // 2, device="cuda")
    arrivals, step = torch.zeros(1000, dtype=torch.int32, device="cuda"), empty_step(num)
    starts = torch.arange(num + 1, dtype=torch.int32, device="cuda")

    def chain() -> Tensor:
        layout = HeadsLayout(num_heads, num_kv_heads, *weights, 1e-6, *rope_tables_half(inverse, step.positions))
        stream, y = step.first.clone(), step.first
        for (before, behind), (keys, values) in zip(products, pages, strict=True):
            query = heads_to_pages(float_product(y, before, None), layout, keys, values, step.slots)
            mixed = paged_attention(
                query,
                keys,
                values,
                step.tables,
                starts,
                step.contexts,
                max_query=1,
                max_context=2048,
                window=None,
                arrivals=arrivals,
            )
            y = add_rms_norm_(stream, float_product(mixed.flatten(1), behind, None), ones, 1e-6)
        return y

    def forget() -> None:
        written = step.slots[step.slots >= 0]
        for page in (page for layer in pages for page in layer):
            page.flatten(0, 1)[written] = float("nan")

    with torch.inference_mode():
        step.fill(generator)
        with overlapped():
            chain()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = chain()
        for turn in range(60):
            step.fill(generator)
            truth = chain()
            assert bool(truth.isfinite().all())
            forget()
            out.zero_()
            graph.replay()
            assert torch.equal(out, truth), turn
            forget()
            with overlapped():
                assert torch.equal(chain(), truth), turn
        assert not bool(arrivals.any())


@pytest.mark.parametrize("heads", [(28, 4, 128), (14, 2, 64)])
def test_fresh_prompts_through_torchs_kernels(heads: tuple[int, int, int]) -> None:
    """First by FlashAttention 2, then, when a shape has come often enough, by cuDNN; queries and keys in one tensor."""
    counts = [1100, 700, 700, 5]
    batch = make_batch(counts, counts, heads, torch.bfloat16, device="cuda")
    places = torch.cat(
        [
            batch.tables[r].long().repeat_interleave(SLOTS)[:n] * SLOTS + torch.arange(n, device="cuda") % SLOTS
            for r, n in enumerate(counts)
        ]
    )
    key, value = batch.keys.flatten(0, 1)[places], batch.values.flatten(0, 1)[places]
    query, key = torch.cat([batch.query[: sum(counts)], key], dim=1).split(heads[:2], dim=1)
    for _ in range(SEEN + 2):
        has_fresh = pays_fresh(counts[:3], heads[0], heads[2], query.dtype, query.device)
        assert has_fresh == (torch.cuda.get_device_capability() >= (9, 0))
        out = torch.full_like(batch.query[: sum(counts)], float("nan"))
        attend_fresh(query, key, value, counts, out)
        assert_near(batch, out)


@pytest.mark.parametrize("scaled", [False, True])
def test_writing(scaled: bool) -> None:
    if scaled and not has_fp8("cuda"):
        pytest.skip("this GPU has no fp8")
    generator = torch.Generator().manual_seed(0)
    dtype = FP8 if scaled else torch.bfloat16
    pages = [torch.zeros(40, SLOTS, 4, 128).to(dtype).cuda() for _ in range(2)]
    scales = [torch.ones(40, 4, device="cuda") if scaled else None for _ in range(2)]
    truth = [None if tensor is None else tensor.clone() for tensor in (*pages, *scales)]
    order = torch.randperm(40, generator=generator)
    filled = [0] * 4
    for step in range(12):
        slots = []
        for request, length in enumerate((1, 7, 16, 30 if step < 4 else 1)):
            positions = torch.arange(filled[request], min(filled[request] + length, 160))
            slots.append(order[request * 10 + positions // SLOTS] * SLOTS + positions % SLOTS)
            filled[request] += len(positions)
        where = torch.cat([*slots, torch.tensor([-1])]).cuda()
        new = torch.randn(len(where), 12, 128, generator=generator).bfloat16().cuda() * 2.0 ** (step % 5)
        write_kv(new[:, :4], new[:, 4:8], pages[0], pages[1], where, scales[0], scales[1])
        write_kv_reference(new[:, :4], new[:, 4:8], truth[0], truth[1], where, truth[2], truth[3])  # type: ignore[arg-type]
    for mine, expected in zip((*pages, *scales), truth, strict=True):
        if mine is not None and expected is not None:
            assert torch.equal(mine.float(), expected.float())

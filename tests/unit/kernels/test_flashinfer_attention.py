"""FlashInfer is planned and run with the right tensors: a stand-in of its signatures equals the reference."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from attention_packages import FakeFlashInfer, install
from paged_batches import PagedBatch, make_batch

from tunesmith.kernels import flashinfer_attention
from tunesmith.kernels.flashinfer_attention import PLANS, FlashInferAttention
from tunesmith.kernels.paged_step import HostLengths, PagedHeads, PagedStep

HEADS = PagedHeads(28, 4, 128, torch.bfloat16, torch.bfloat16, 16, (None,), (9, 0))
STEPS = {
    "decode": ([1, 1, 1], [5, 40, 17]),
    "mixed": ([1, 20, 3, 1], [5, 20, 40, 33]),
    "drafts": ([3, 3], [30, 3]),
}


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> FakeFlashInfer:
    monkeypatch.setattr(flashinfer_attention, "WORKSPACE_BYTES", 64)
    return install(monkeypatch, FakeFlashInfer())


def step_of(batch: PagedBatch) -> PagedStep:
    host = HostLengths(batch.starts.numpy(), batch.context.numpy(), batch.tables.numpy())
    least = int(batch.starts.diff().min())
    tensors = (batch.tables, batch.starts, batch.context)
    return PagedStep(*tensors, batch.max_query, batch.max_context, least, host)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("heads", [(6, 2, 16), (4, 4, 8)], ids=str)
@pytest.mark.parametrize("kind", STEPS)
def test_equals_the_reference(kind: str, heads: tuple[int, int, int], window: int | None) -> None:
    batch = make_batch(*STEPS[kind], heads, torch.bfloat16)
    query, step = batch.query[: int(batch.starts[-1])], step_of(batch)
    kernel = FlashInferAttention()
    assert kernel.serves(step) and not kernel.serves(replace(step, host=None))
    options = {"window": window, "scale": heads[2] ** -0.5}
    out = torch.empty_like(query)
    assert kernel(query, batch.keys, batch.values, step, **options, out=out) is out
    torch.testing.assert_close(out, batch.truth(window))
    assert torch.equal(kernel(query, batch.keys, batch.values, step, **options), out)


def test_a_step_is_planned_once_and_anew_where_its_plan_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, planned = FlashInferAttention(), []
    plan = kernel._plan
    monkeypatch.setattr(kernel, "_plan", lambda *args: (planned.append(args[2]), plan(*args))[1])
    batches = [make_batch([1, 1], [5, 20 + seed], (4, 2, 8), torch.bfloat16, seed=seed) for seed in range(PLANS + 1)]
    steps = [step_of(batch) for batch in batches]

    def check(place: int) -> None:
        batch = batches[place]
        given = kernel(batch.query[:2], batch.keys, batch.values, steps[place], window=None, scale=8**-0.5)
        torch.testing.assert_close(given, batch.truth())

    for place in [*range(PLANS), *range(PLANS)]:
        check(place)
    assert len(planned) == PLANS
    check(PLANS)
    check(0)
    assert planned[PLANS:] == [steps[PLANS], steps[0]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"capability": (12, 0), "head_dim": 64}, None),
        ({"capability": (7, 5)}, "compute capability 7.5"),
        ({"head_dim": 80}, "not for heads of 80"),
        ({"page_dtype": torch.float8_e4m3fn}, "these hold float8_e4m3fn"),
        ({"is_shared": True}, "processes that share a model"),
    ],
)
def test_what_it_is_not_for(changes: dict, said: str | None) -> None:
    reason = FlashInferAttention().refused(replace(HEADS, **changes))
    assert reason is None if said is None else said in str(reason)

"""Kernels beside ours: what is right is timed, what is wrong or fails is dropped with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.engine.attention_shapes import AttentionShape
from tunesmith.engine.attention_timing import Measured, compare, difference
from tunesmith.kernels.paged_attention import paged_attention
from tunesmith.kernels.paged_step import PagedHeads, PagedStep

HEADS = PagedHeads(4, 2, 16, torch.bfloat16, torch.bfloat16, 16, (None, 8, 8), (9, 0))
SHAPES = [AttentionShape("decode", 2, 1, 40), AttentionShape("mixed", 1, 20, 30, decoding=1)]


class Kernel:
    """Ours under another name, with something wrong in some steps."""

    name, version, records = "other", "1", True

    def __init__(self, spoil: Callable[[Tensor, PagedStep, int | None], Tensor] = lambda out, *_: out) -> None:
        self.spoil = spoil

    def refused(self, heads: PagedHeads) -> str | None:
        return None

    def serves(self, step: PagedStep) -> bool:
        return True

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, step: PagedStep, **options: Any) -> Tensor:
        tensors = (step.block_tables_RP, step.query_starts_R1, step.context_R)
        sizes = {"max_query": step.max_query, "max_context": step.max_context}
        out = paged_attention(query, keys, values, *tensors, **sizes, **options)
        return self.spoil(out, step, options["window"])


def timer(work: Callable[[], object], is_recorded: bool) -> float:
    work()
    return 2.0 if is_recorded else 5.0


def fail(out: Tensor, step: PagedStep, window: int | None) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor this chip")


def test_all_layers_are_counted() -> None:
    found = compare({"other": Kernel()}, HEADS, SHAPES, torch.device("cpu"), timer)
    assert found == Measured(
        {SHAPES[0].label: {"other": 6.0, "triton": 6.0}, SHAPES[1].label: {"other": 15.0, "triton": 15.0}}
    )


def test_without_a_timer_they_are_only_checked() -> None:
    assert compare({"other": Kernel()}, HEADS, SHAPES, torch.device("cpu")).dropped == {}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda out, *_: out + 0.2, "its results are wrong: up to 0.2"),
        (lambda out, *_: out * float("nan"), "its results are wrong: up to nan"),
        (lambda out, step, window: out if step.is_decode or window is None else out * 2, "its results are wrong"),
        (lambda out, *_: out.float(), "torch.float32, not [2, 4, 16]"),
        (fail, "it fails: RuntimeError: no kernel image is available"),
    ],
)
def test_what_is_wrong_anywhere_is_dropped_everywhere(spoil: Any, said: str) -> None:
    kernels = {"bad": Kernel(spoil), "good": Kernel()}
    found = compare(kernels, HEADS, SHAPES, torch.device("cpu"), timer)
    assert said in found.dropped["bad"] and set(found.dropped) == {"bad"}
    assert "\n" not in found.dropped["bad"]
    assert all(set(times) == {"good", "triton"} for times in found.milliseconds.values())


def test_what_lies_behind_a_context_is_no_number() -> None:
    """Pages are memory that nobody wrote: a kernel that multiplies it by a weight of 0 is found out."""
    seen = []

    def look(out: Tensor, step: PagedStep, window: int | None) -> Tensor:
        assert step.host is not None
        seen.append((step.host.contexts.tolist(), step.host.tables))
        return out

    whole = Kernel(look)

    def reads_all(query: Tensor, keys: Tensor, values: Tensor, step: PagedStep, **options: Any) -> Tensor:
        assert step.host is not None
        for context, table in zip(step.host.contexts, step.host.tables, strict=True):
            page, rest = values[int(table[(context - 1) // 16])], (int(context) - 1) % 16 + 1
            assert not page[:rest].isnan().any() and page[rest:].isnan().all()
        return whole(query, keys, values, step, **options)

    found = compare({"other": reads_all}, HEADS, SHAPES, torch.device("cpu"))  # type: ignore[dict-item]
    assert not found.dropped and {tuple(contexts) for contexts, _ in seen} == {(40, 33), (30, 23)}


def test_rounding_is_no_difference() -> None:
    truth = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert difference(truth * 1.008, truth) is None
    assert difference(truth[:2], truth) is not None


def test_no_memory_is_no_failure_of_a_kernel() -> None:
    def full(out: Tensor, step: PagedStep, window: int | None) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        compare({"other": Kernel(full)}, HEADS, SHAPES, torch.device("cpu"), timer)

"""Stretches of time, and the share of a step that nothing but communication fills."""

from __future__ import annotations

import random

import pytest

from tunesmith.bench.intervals import length, union, without
from tunesmith.bench.step_split import Timeline, device_timeline, host_timeline


def test_union_joins_what_touches_or_overlaps() -> None:
    assert union([(5, 6), (0, 2), (1, 3), (3, 4), (9, 9)]) == [(0, 4), (5, 6)]
    assert union([(0, 10), (2, 3)]) == [(0, 10)]
    assert union([]) == []


def test_length_counts_time_once() -> None:
    assert length([(0, 2), (1, 3), (5, 6)]) == 4
    assert length([]) == 0


def test_without_cuts_holes() -> None:
    assert without([(0, 10)], [(2, 3), (5, 7)]) == [(0, 2), (3, 5), (7, 10)]
    assert without([(0, 4), (6, 8)], [(3, 7)]) == [(0, 3), (7, 8)]
    assert without([(0, 4)], [(0, 4)]) == []
    assert without([(0, 4)], []) == [(0, 4)]
    assert without([], [(0, 4)]) == []
    assert without([(2, 3)], [(0, 1), (5, 9)]) == [(2, 3)]


def test_against_counting_every_unit_of_time() -> None:
    """Random stretches of whole units, counted one by one."""
    generator = random.Random(0)

    def draw() -> list[tuple[float, float]]:
        starts = [generator.randrange(40) for _ in range(generator.randrange(12))]
        return [(start, start + generator.randrange(6)) for start in starts]

    for _ in range(300):
        one, other = draw(), draw()
        inside = {t for start, end in one for t in range(int(start), int(end))}
        holes = {t for start, end in other for t in range(int(start), int(end))}
        assert length(one) == len(inside)
        assert length(without(one, other)) == len(inside - holes)


def _event(name: str, start: float, duration: float, category: str = "kernel", thread: int = 7) -> dict[str, object]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": thread}


def test_a_gpus_trace_by_hand() -> None:
    """100 us: computing 0-40 and 50-80, NCCL 30-60 and 90-100: exposed are 40-50 and 90-100, idle 80-90."""
    events = [
        _event("gemm", 0, 40),
        _event("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgs)", 30, 30, thread=20),
        _event("Memcpy DtoD", 50, 30, "gpu_memcpy"),
        _event("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", 90, 10, thread=20),
        _event("FSDP::all_gather", 0, 100, "gpu_user_annotation"),
        _event("cudaLaunchKernel", 0, 500, "cuda_runtime"),
        {"ph": "i", "cat": "kernel", "name": "marker", "ts": 5000},
    ]
    split = device_timeline(events).split()
    assert split is not None
    assert split.exposed_ratio == pytest.approx(0.2)
    assert split.communication_ratio == pytest.approx(0.4)
    assert split.idle_ratio == pytest.approx(0.1)
    assert split.traced_s == pytest.approx(100e-6)


def test_a_cpus_trace_by_hand() -> None:
    """gloo's thread is not computing even where it adds; a node of autograd that waits inside is not either."""
    events = [
        _event("aten::mm", 0, 50, "cpu_op", thread=1),
        _event("MmBackward0", 0, 90, "cpu_op", thread=1),
        _event("c10d::allreduce_", 50, 40, "cpu_op", thread=1),
        _event("gloo:all_reduce", 40, 40, "user_annotation", thread=2),
        _event("aten::add_", 60, 10, "cpu_op", thread=2),
        _event("tunesmith::adamw", 90, 10, "cpu_op", thread=1),
    ]
    split = host_timeline(events).split()
    assert split is not None
    assert split.exposed_ratio == pytest.approx(0.3)
    assert split.idle_ratio == pytest.approx(0.1)


def test_nothing_traced_is_nothing_known() -> None:
    assert Timeline((), ()).split() is None

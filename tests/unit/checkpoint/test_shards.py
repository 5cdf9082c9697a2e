"""Boxes of tensors, and who writes which."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.checkpoint.shards import (
    SINGLE,
    Box,
    Shard,
    Slices,
    box_of,
    check_complete,
    cut,
    cut_rows,
    make_plan,
    overlap,
    relative,
    whole,
    whole_slices,
)
from tunesmith.errors import CheckpointError


def boxes_of(shape: tuple[int, ...], generator: random.Random) -> list[Slices]:
    """A random partition of a shape by cuts."""
    parts = [whole_slices(shape)]
    for _ in range(generator.randrange(6)):
        part = parts.pop(generator.randrange(len(parts)))
        dim = generator.randrange(len(shape))
        start, stop = part[dim]
        edge = generator.randint(start, stop)
        parts += [(*part[:dim], (a, b), *part[dim + 1 :]) for a, b in ((start, edge), (edge, stop))]
    return parts


@settings(max_examples=100, deadline=None)
@given(shape=st.lists(st.integers(1, 6), min_size=1, max_size=3), seed=st.integers(0, 10**6))
def test_any_partition_is_complete_and_any_change_is_not(shape: list[int], seed: int) -> None:
    generator = random.Random(seed)
    parts = boxes_of(tuple(shape), generator)
    check_complete("w", tuple(shape), parts)
    filled = [part for part in parts if all(a < b for a, b in part)]
    lost = generator.choice(filled)
    with pytest.raises(CheckpointError, match="parts of w are not all of it"):
        check_complete("w", tuple(shape), [part for part in filled if part != lost])
    with pytest.raises(CheckpointError, match="parts of w overlap"):
        check_complete("w", tuple(shape), [*filled, lost])


def test_scalars_and_empty_tensors() -> None:
    check_complete("w", (), [()])
    check_complete("w", (0, 4), [((0, 0), (0, 4))])
    with pytest.raises(CheckpointError, match="not all of it"):
        check_complete("w", (), [])


def test_overlap_and_relative() -> None:
    assert overlap(((0, 4), (2, 6)), ((3, 9), (0, 3))) == ((3, 4), (2, 3))
    assert overlap(((0, 4),), ((4, 9),)) is None
    assert overlap((), ()) == ()
    assert relative(((3, 4), (2, 3)), ((3, 9), (0, 3))) == ((0, 1), (2, 3))


def test_a_fused_tensor_is_cut_into_ranges_of_rows() -> None:
    full = torch.arange(24.0).view(12, 2)
    local = torch.cat([full[2:4], full[9:10]])
    shards = cut_rows("w", local, (12, 2), [(2, 4), (9, 10)])
    assert [shard.slices for shard in shards] == [((2, 4), (0, 2)), ((9, 10), (0, 2))]
    assert all(torch.equal(s.tensor, full[s.slices[0][0] : s.slices[0][1]]) for s in shards)
    (column,) = cut("w", full[:, 1:], (12, 2), [(((0, 12), (0, 1)), ((0, 12), (1, 2)))])
    assert (column.slices, column.tensor[:, 0].tolist()) == (((0, 12), (1, 2)), full[:, 1].tolist())


@pytest.mark.parametrize("slices", [((0, 3), (0, 2)), ((1, 3),), ((2, 0), (0, 2)), ((3, 5), (0, 2))])
def test_a_shard_that_is_not_what_it_says(slices: Slices) -> None:
    with pytest.raises(CheckpointError, match=r"w: a tensor of shape \(2, 2\)"):
        box_of(Shard("w", torch.zeros(2, 2), (4, 2), slices))


def test_a_dtype_that_no_file_has() -> None:
    with pytest.raises(CheckpointError, match=r"can't hold torch\.complex64"):
        box_of(whole("w", torch.zeros(2, dtype=torch.complex64)))


def box(name: str, size: int, start: int = 0, total: int | None = None) -> Box:
    return Box(name, "F32", (total or size,), ((start, start + size),))


def test_what_all_hold_goes_where_least_is_written() -> None:
    """Process 0 has much of its own: what both hold goes to the other, until it has as much."""
    shared = [box(f"shared.{n}", 10) for n in range(6)]
    plan = make_plan([[box("a", 30), *shared], [box("b", 10), *shared]])
    assert [plan.num_bytes(rank) for rank in range(2)] == [200, 200]
    names = [plan.boxes[file.rank][number].name for file in plan.files for number, _ in file.entries]
    assert sorted(names) == sorted(["a", "b", *(item.name for item in shared)])


def test_the_plan_does_not_depend_on_the_order_of_what_all_hold() -> None:
    shared = [box(f"w{n}", 1 + n % 3) for n in range(9)]
    backwards = shared[::-1]

    def written(boxes: list[Box]) -> dict[str, int]:
        plan = make_plan([boxes, boxes, boxes])
        return {plan.boxes[file.rank][number].name: file.rank for file in plan.files for number, _ in file.entries}

    assert written(shared) == written(backwards)


def test_one_file_has_the_short_name_and_the_logical_keys() -> None:
    plan = make_plan([[box("w", 3), box("v", 2)]])
    assert [file.name for file in plan.files] == [SINGLE]
    assert [key for _, key in plan.files[0].entries] == ["w", "v"]
    assert plan.index()["w"] == {
        "global_shape": [3],
        "dtype": "F32",
        "pieces": [{"file": SINGLE, "key": "w", "slices": [[0, 3]]}],
    }


def test_large_files_are_cut_and_wide_dtypes_come_first() -> None:
    boxes = [Box("bytes", "U8", (3,), ((0, 3),)), *(box(f"w{n}", 10) for n in range(5))]
    plan = make_plan([boxes], 90)
    assert [file.name for file in plan.files] == [f"tensors-{n:05d}-of-00003.safetensors" for n in range(3)]
    assert [key for _, key in plan.files[0].entries] == ["w0", "w1", "bytes"]


def test_nothing_at_all_is_one_empty_file() -> None:
    assert [(file.name, file.entries) for file in make_plan([[], []]).files] == [(SINGLE, ())]


def test_empty_shares_are_not_written() -> None:
    plan = make_plan([[box("w", 3, 0, 3)], [box("w", 0, 3, 3)]])
    assert len(plan.files) == 1

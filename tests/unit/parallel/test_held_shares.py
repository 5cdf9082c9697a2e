"""Parts of int8 and int4 weights have the values of the whole, wherever borders tear groups and whatever the order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tunesmith.errors import ParallelError
from tunesmith.kernels.int4 import Int4Weight, dequantize_reference, quantize_int4
from tunesmith.kernels.int8 import dequantize_int8, quantize_int8
from tunesmith.parallel.held_shares import cut_int4, cut_int8
from tunesmith.parallel.placement import Shard

ROWS = 6


def weight(width: int) -> Tensor:
    return torch.randn(ROWS, width, generator=torch.Generator().manual_seed(width))


def shards(kind: str, count: int, width: int, part: str = "down_proj") -> list[Shard]:
    return [Shard(kind, index, count, {part: ROWS}, width) for index in range(count)]  # type: ignore[arg-type]


def values(part: Int4Weight, num_inputs: int) -> Tensor:
    """The columns where the input has them; what lies behind the input is left out."""
    held = dequantize_reference(part, torch.float32)
    if part.order is None:
        return held
    out = torch.zeros(held.shape[0], num_inputs + 1)
    out[:, part.order] = held
    return out[:, :num_inputs]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("width", "count", "group", "expected"),
    [(512, 2, 128, 128), (320, 2, 128, 32), (384, 3, 64, 64), (192, 2, 128, 32), (192, 2, 64, 32), (64, 2, 32, 32)],
)
def test_columns_of_int4(width: int, count: int, group: int, expected: int, symmetric: bool) -> None:
    """Whole groups, groups torn by a border, and a last block that is not full."""
    whole = quantize_int4(weight(width), group, symmetric)
    parts = [cut_int4(whole, shard, "down_proj") for shard in shards("columns", count, width)]
    assert {part.group_size for part in parts} == {expected}
    got = torch.cat([values(part, width // count) for part in parts], dim=1)
    assert torch.equal(got, dequantize_reference(whole, torch.float32))


@pytest.mark.parametrize(("width", "count", "group"), [(512, 2, 128), (192, 3, 64), (192, 2, 32)])
def test_columns_that_are_sorted_by_activation(width: int, count: int, group: int) -> None:
    """Each process has the held columns of its own inputs; zero points of 16, which GPTQ has, are no codes."""
    order = torch.randperm(width, generator=torch.Generator().manual_seed(1))
    whole = replace(quantize_int4(weight(width), group), order=order)
    assert whole.zeros is not None
    whole.zeros[:, 0] = 16
    x_TD = torch.randn(3, width, generator=torch.Generator().manual_seed(2))
    truth = torch.zeros(ROWS, width)
    truth[:, order] = dequantize_reference(whole, torch.float32)
    parts = [cut_int4(whole, shard, "down_proj") for shard in shards("columns", count, width)]
    own = width // count
    assert torch.equal(torch.cat([values(part, own) for part in parts], dim=1), truth)
    y = torch.zeros(3, ROWS)
    for part, x in zip(parts, x_TD.split(own, dim=1), strict=True):
        assert part.order is not None and part.shape[1] % 32 == 0
        y += torch.nn.functional.pad(x, (0, 1))[:, part.order] @ dequantize_reference(part, torch.float32).t()
    assert torch.allclose(y, x_TD @ truth.t(), atol=1e-4)


def test_rows() -> None:
    """GPT-2's queries, keys and values are cut as three; an order of columns stays whole."""
    dense, order = weight(64), torch.arange(63, -1, -1)
    for shard in shards("rows", 2, 64, "c_attn"):
        rows = torch.cat([torch.arange(start, stop) for start, stop in shard.rows("c_attn")])
        whole = replace(quantize_int4(dense, 32), order=order)
        part = cut_int4(whole, shard, "c_attn")
        assert part.order is order and part.shape == (3, 64)
        assert torch.equal(dequantize_reference(part), dequantize_reference(whole)[rows])
        eight = cut_int8(quantize_int8(dense), shard, "c_attn")
        assert torch.equal(dequantize_int8(eight.codes, eight.scale, torch.float32), _whole8(dense)[rows])


def test_columns_of_int8_keep_the_scales_of_whole_rows() -> None:
    dense = weight(64)
    parts = [cut_int8(quantize_int8(dense), shard, "down_proj") for shard in shards("columns", 2, 64)]
    got = [dequantize_int8(part.codes, part.scale, torch.float32) for part in parts]
    assert torch.equal(torch.cat(got, dim=1), _whole8(dense))


def _whole8(dense: Tensor) -> Tensor:
    whole = quantize_int8(dense)
    return dequantize_int8(whole.codes, whole.scale, torch.float32)


def test_a_share_that_no_group_divides_is_refused_with_what_would_work() -> None:
    with pytest.raises(ParallelError, match=r"192 columns is 48, not a multiple of 32.*one of 1, 2, 3, or quantize"):
        cut_int4(quantize_int4(weight(192)), shards("columns", 4, 192)[0], "down_proj")

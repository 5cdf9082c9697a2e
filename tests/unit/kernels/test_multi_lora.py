"""Adapters of many requests in one pass: against each adapter alone, and the kernels against the reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tunesmith.kernels import multi_lora
from tunesmith.kernels.multi_lora import (
    AdapterStack,
    add_multi_lora,
    empty_stack,
    token_adapters,
    token_adapters_on_device,
)
from tunesmith.kernels.multi_lora_tiles import NO_ADAPTER, TILE, WIDE_TILE, num_tiles, plan_tiles, tile_of

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(ranks: list[list[int]], width: int, parts: tuple[int, ...], max_rank: int) -> AdapterStack:
    """A stack whose every value is random, also where a rank says that nothing is to be read."""
    stack = empty_stack(len(ranks), width, parts, max_rank, torch.float32, CPU)
    stack.down_AQD.copy_(random(*stack.down_AQD.shape, seed=1))
    stack.up_AFR.copy_(random(*stack.up_AFR.shape, seed=2))
    stack.ranks_AP.copy_(torch.tensor(ranks))
    stack.ranks[:] = ranks
    return stack


@pytest.mark.parametrize(
    "slots", [[0], [1, 1, 1, 0, 0], [2, -1, 0, 2, 1, -1], [-1, -1], [0, 0, -1, -1, 2, 2, 2, 0]], ids=str
)
def test_every_token_gets_its_own_adapter(slots: list[int]) -> None:
    parts, width, max_rank = (6, 3, 5), 8, 4
    stack = filled([[4, 0, 2], [1, 3, 4], [2, 2, 2]], width, parts, max_rank)
    x, y = random(len(slots), width, seed=3), random(len(slots), sum(parts), seed=4)
    expected = y.clone()
    for token, slot in enumerate(slots):
        first = 0
        for part, rows in enumerate(parts):
            rank = stack.ranks[slot][part] if slot != NO_ADAPTER else 0
            down = stack.down_AQD[slot, part * max_rank : part * max_rank + rank]
            up = stack.up_AFR[slot, first : first + rows, :rank]
            expected[token, first : first + rows] += up @ (down @ x[token])
            first += rows
    add_multi_lora(y, x, stack, token_adapters(slots, 3, CPU))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_bands_are_of_one_projection_and_cover_all_columns() -> None:
    bands = empty_stack(1, 8, (300, 1, 128), 4, torch.float32, CPU).bands_N3.tolist()
    assert bands == [[0, 0, 128], [0, 128, 256], [0, 256, 300], [1, 300, 301], [2, 301, 429]]


def test_tiles_hold_tokens_of_one_adapter_and_their_number_is_a_function_of_the_tokens_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(multi_lora, "use_kernel", lambda device: True)
    generator = np.random.default_rng(0)
    for tokens in (1, 5, 16, 33, 200):
        for _ in range(20):
            slots = generator.integers(-1, 6, tokens).astype(np.int32)
            order, tiles = plan_tiles(slots, 6, TILE)
            on_device = token_adapters_on_device(torch.from_numpy(slots), 6)
            assert on_device.order_T is not None and on_device.tiles_G3 is not None
            assert on_device.order_T.tolist() == order.tolist()
            assert on_device.tiles_G3.tolist() == tiles.tolist()
            assert sorted(order.tolist()) == list(range(tokens))
            assert tiles.shape == (num_tiles(tokens, 6, TILE), 3)
            covered = []
            for slot, first, stop in tiles.tolist():
                if slot == NO_ADAPTER:
                    continue
                assert 0 < stop - first <= TILE
                assert {int(slots[token]) for token in order[first:stop]} == {slot}
                covered += order[first:stop].tolist()
            assert sorted(covered) == np.flatnonzero(slots >= 0).tolist()


def test_a_tile_is_wide_where_there_are_many_tokens_unless_sums_must_not_change() -> None:
    assert (tile_of(1), tile_of(64), tile_of(4096)) == (TILE, TILE, WIDE_TILE)
    assert tile_of(4096, invariant=True) == TILE


KERNEL = """
import numpy as np, torch
from tunesmith.kernels.multi_lora import *
from tunesmith.kernels.multi_lora import TokenAdapters
from tunesmith.kernels.multi_lora_tiles import plan_tiles
from tunesmith.kernels.multi_lora_triton import multi_lora_operator, num_chunks, depth_of

generator = torch.Generator().manual_seed(0)
def random(*shape): return torch.randn(shape, generator=generator)

def check(dtype, limit, slots, ranks, width, parts, max_rank, tile):
    stack = empty_stack(len(ranks), width, parts, max_rank, dtype, torch.device("cpu"))
    stack.down_AQD.copy_(random(*stack.down_AQD.shape) / width**0.5)
    stack.up_AFR.copy_(random(*stack.up_AFR.shape))
    stack.ranks_AP.copy_(torch.tensor(ranks))
    stack.ranks[:] = ranks
    slots = np.asarray(slots, dtype=np.int32)
    order, tiles = map(torch.from_numpy, plan_tiles(slots, len(ranks), tile))
    chosen = TokenAdapters(slots, len(ranks), torch.device("cpu"), tile)
    wide = random(len(slots), width + 8).to(dtype)
    x, y = wide[:, 8:], random(len(slots), sum(parts)).to(dtype)
    truth = y.clone()
    add_multi_lora_reference(truth, x, stack, chosen)
    assert not torch.equal(truth, y) or max(slots) < 0
    mine = y.clone()
    arguments = (stack.down_AQD, stack.up_AFR, stack.ranks_AP, stack.bands_N3, order, tiles, tile)
    multi_lora_operator(mine, x, *arguments)
    torch.testing.assert_close(mine, truth, rtol=limit, atol=limit)
    # Alone, or beside others: the same bits.
    for token in (0, len(slots) - 1):
        order, tiles = map(torch.from_numpy, plan_tiles(slots[token : token + 1], len(ranks), tile))
        alone = y[token : token + 1].clone()
        multi_lora_operator(alone, x[token : token + 1], *arguments[:4], order, tiles, tile)
        assert torch.equal(alone[0], mine[token])

assert num_chunks(3584, 128, 16) == 7 and num_chunks(64, 64, 16) == 1 and num_chunks(3584, 128, 64) == 1
ranks = [[4, 0, 2], [16, 3, 4], [2, 20, 2]]
check(torch.float32, 1e-5, [0], ranks, 48, (6, 3, 5), 20, 16)
check(torch.float32, 1e-5, [2, -1, 0, 2, 1], ranks, 600, (130, 2, 1), 20, 16)
check(torch.float32, 1e-5, [-1, -1], ranks, 48, (6, 3, 5), 20, 16)
check(torch.float32, 1e-5, [1] * 20 + [0] + [-1] * 3, ranks, 72, (130, 7, 1), 20, 16)
check(torch.float32, 1e-5, [1] * 70 + [2], ranks, 72, (130, 7, 1), 20, 64)
check(torch.float16, 2**-7, [2, -1, 0, 1], ranks, 1100, (32, 32, 1), 20, 16)
check(torch.float32, 1e-5, [0, 1], [[1], [64]], 70, (33,), 64, 16)
y, x = random(1, 33), random(1, 70)
stack = empty_stack(2, 70, (33,), 64, torch.float32, torch.device("cpu"))
order, tiles = map(torch.from_numpy, plan_tiles(np.zeros(1, np.int32), 2, 16))
arguments = (y, x, stack.down_AQD, stack.up_AFR, stack.ranks_AP, stack.bands_N3, order, tiles, 16)
torch.library.opcheck(multi_lora_operator, arguments, test_utils=("test_schema", "test_faketensor"))
"""


def test_the_kernels_equal_the_reference_under_the_interpreter(check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(KERNEL)

"""Attention row by row on a CPU: the values of the reference, and bits that only the row decides."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tunesmith.engine.attend_rows import attend_rows, rows_of
from tunesmith.engine.pages import PAGE_SLOTS
from tunesmith.kernels.paged_attention import paged_attention_reference


def make_batch(tables: list[list[int]], contexts: list[int]) -> Any:
    width = max(map(len, tables))
    padded = [[*table, *[0] * (width - len(table))] for table in tables]
    return SimpleNamespace(block_tables_RP=torch.tensor(padded, dtype=torch.int32), context_R=torch.tensor(contexts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 20])
def test_rows_equal_the_reference_and_stay_the_same_in_any_company(window: int | None, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(9, PAGE_SLOTS, 2, 8, generator=generator).to(dtype) for _ in range(2))
    query = torch.randn(4, 6, 8, generator=generator).to(dtype)
    tables, contexts = [[2, 3, 4], [8, 0, 5], [7], [6, 1]], [41, 48, 1, 17]
    batch = make_batch(tables, contexts)
    rows = rows_of(cast(Any, batch))
    assert [row.start for row in rows] == [2 * PAGE_SLOTS, None, 7 * PAGE_SLOTS, None]
    mine = attend_rows(query, keys, values, rows, window)
    starts = torch.arange(5, dtype=torch.int32)
    expected = paged_attention_reference(
        query, keys, values, batch.block_tables_RP, starts, batch.context_R, window=window, scale=8**-0.5
    )
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(mine, expected, atol=tolerance, rtol=tolerance)
    for place in range(4):
        alone = rows_of(cast(Any, make_batch([tables[place]], [contexts[place]])))
        assert torch.equal(attend_rows(query[place : place + 1], keys, values, alone, window)[0], mine[place])
    # The same keys on scattered pages.
    moved_keys, moved_values = keys.clone(), values.clone()
    for old, new in zip([2, 3, 4], [4, 2, 3], strict=True):
        moved_keys[new], moved_values[new] = keys[old], values[old]
    scattered = rows_of(cast(Any, make_batch([[4, 2, 3]], [41])))
    assert scattered[0].start is None
    assert torch.equal(attend_rows(query[:1], moved_keys, moved_values, scattered, window)[0], mine[0])

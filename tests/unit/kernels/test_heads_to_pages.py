"""Heads normed, rotated and written into pages at once: against the operations it joins, kernel against reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tunesmith.kernels.heads_to_pages import HeadsLayout, heads_to_pages
from tunesmith.kernels.kv_cache import write_kv
from tunesmith.kernels.rope import rope_tables_half
from tunesmith.model.heads import Heads

KERNEL = """
from dataclasses import replace
import torch
from tunesmith.kernels import heads_to_pages_triton as module
from tunesmith.kernels.heads_to_pages import HeadsLayout, heads_to_pages_reference
from tunesmith.kernels.rope import rope_tables_half

module._TOKENS_FROM = ((9, 8), (6, 4), (0, 1))  # so that programs of one token and of several are both run
cases = ((1, 4, 2, 16, True, True), (7, 6, 2, 24, False, True), (9, 2, 2, 16, False, False), (3, 8, 1, 32, True, True))
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):  # the interpreter cuts bfloat16, not rounds
    for tokens, heads, kv_heads, width, normed, rotated in cases:
        generator = torch.Generator().manual_seed(tokens)
        qkv = torch.randn(tokens, (heads + 2 * kv_heads) * width, generator=generator).to(dtype)
        pages = [torch.zeros(6, 4, kv_heads, width, dtype=dtype) for _ in range(4)]
        slots = torch.randperm(24, generator=generator)[:tokens]
        slots[tokens // 2] = -1 if tokens > 2 else slots[tokens // 2]
        weights = (torch.rand(width) + 0.5, torch.rand(width) + 0.5) if normed else (None, None)
        tables = rope_tables_half(torch.rand(width // 2), torch.arange(tokens) + 3) if rotated else (None, None)
        layout = HeadsLayout(heads, kv_heads, *weights, 1e-6, *tables)
        wanted = heads_to_pages_reference(qkv, layout, *pages[:2], slots)
        given = (qkv, heads, kv_heads, *weights, 1e-6, *tables, *pages[2:], slots)
        if tokens == 3:
            layout = replace(layout, keeps_keys=True)
            query, wanted = wanted, heads_to_pages_reference(qkv, layout, *pages[:2], slots)
            assert torch.equal(wanted[:, :heads], query)
        found = module.heads_to_pages_operator(*given, tokens == 7, layout.keeps_keys)
        for a, b in ((found, wanted), (pages[2], pages[0]), (pages[3], pages[1])):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
"""


@pytest.mark.parametrize("is_normed", [True, False])
def test_equals_the_operations_one_after_the_other(is_normed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    heads = Heads(4, 2, 16, 1e-6)
    qkv = torch.randn(5, 8 * 16, generator=generator)
    weights = (torch.rand(16) + 0.5, torch.rand(16) + 0.5) if is_normed else (None, None)
    tables = rope_tables_half(torch.rand(8, generator=generator), torch.arange(5) + 2)
    slots = torch.tensor([3, -1, 9, 0, 17])
    keys, values, wanted_keys, wanted_values = (torch.zeros(5, 4, 2, 16) for _ in range(4))
    query = heads_to_pages(qkv, HeadsLayout(4, 2, *weights, 1e-6, *tables), keys, values, slots)
    wanted, key, value, _ = heads.prepare(qkv.clone(), weights, tables)
    write_kv(key, value, wanted_keys, wanted_values, slots)
    torch.testing.assert_close(query, wanted)
    torch.testing.assert_close(keys, wanted_keys)
    assert torch.equal(values, wanted_values)
    assert not bool(keys.view(-1, 2, 16)[1].any())


def test_the_kernel_equals_the_reference(check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(KERNEL)

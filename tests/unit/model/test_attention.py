"""Attention against the formula written out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.arch import ModelConfig
from tunesmith.model import attention
from tunesmith.model.attention import REACH, PackedAttention, attend_one, causal_mask, fits_varlen, within_reach
from tunesmith.model.packed import pack_documents

CONFIG = ModelConfig(
    family="llama",
    vocab_size=32,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    norm_eps=1e-6,
)


def _formula(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """One query at a time, one head at a time: the softmax over the keys it may see."""
    out = torch.zeros_like(query)
    offset = key.shape[0] - query.shape[0]
    for t in range(query.shape[0]):
        last = offset + t + 1
        first = 0 if window is None else max(0, last - window)
        for head in range(query.shape[1]):
            kv = head // (query.shape[1] // key.shape[1])
            scores = key[first:last, kv] @ query[t, head] / query.shape[2] ** 0.5
            out[t, head] = scores.softmax(0) @ value[first:last, kv]
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (1, 6), (2, 6), (1, 1)])
def test_one_document(window: int | None, queries: int, keys: int) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(queries, 4, 8), torch.randn(keys, 2, 8), torch.randn(keys, 2, 8)
    torch.testing.assert_close(attend_one(query, key, value, window), _formula(query, key, value, window))


@pytest.mark.parametrize(("queries", "keys", "window"), [(10, 10, 3), (10, 14, 5), (9, 9, 1), (4, 12, 6)])
def test_many_queries_within_a_window_go_through_in_parts(
    queries: int, keys: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[tuple[int, int]] = []

    def counted(num_queries: int, num_keys: int, *rest: Any) -> Tensor:
        masks.append((num_queries, num_keys))
        return causal_mask(num_queries, num_keys, *rest)

    monkeypatch.setattr(attention, "MASKED", 4)
    monkeypatch.setattr(attention, "causal_mask", counted)
    torch.manual_seed(0)
    query, key, value = (torch.randn(count, heads, 8) for count, heads in ((queries, 4), (keys, 2), (keys, 2)))
    torch.testing.assert_close(attend_one(query, key, value, window), _formula(query, key, value, window))
    assert all(rows <= 4 and (columns <= 4 + window - 1 or queries <= 4) for rows, columns in masks)


def test_packed_documents_and_their_windows() -> None:
    torch.manual_seed(0)
    config = replace(CONFIG, sliding_window=2, sliding_layers=(1,))
    pack = pack_documents([[1] * 5, [2], [3] * 4])
    query, key, value = torch.randn(10, 4, 8), torch.randn(10, 2, 8), torch.randn(10, 2, 8)
    for layer, window in ((0, None), (1, 2)):
        out = PackedAttention(config, pack)[layer](query, key, value)
        parts = zip(*(x.split([5, 1, 4]) for x in (query, key, value)), strict=True)
        expected = torch.cat([_formula(q, k, v, window) for q, k, v in parts])
        torch.testing.assert_close(out, expected)


def test_the_mask_of_the_last_queries() -> None:
    assert causal_mask(2, 4, None, torch.device("cpu")).tolist() == [[True, True, True, False], [True] * 4]
    assert causal_mask(2, 4, 2, torch.device("cpu")).tolist() == [
        [False, True, True, False],
        [False, False, True, True],
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 7])
def test_the_variable_length_kernel(window: int | None) -> None:
    torch.manual_seed(0)
    layers = (0,) if window else ()
    config = replace(CONFIG, head_dim=64, sliding_window=window, sliding_layers=layers)
    pack = pack_documents([[1] * 50, [2], [3] * 77], "cuda")
    query = torch.randn(128, 4, 64, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(128, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = PackedAttention(config, pack)[0](query, key, value)
    wide = PackedAttention(config, pack)[0](query.float(), key.float(), value.float())
    torch.testing.assert_close(out.float(), wide, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "capability", "fits"),
    [
        (128, torch.bfloat16, (9, 0), True),
        (128, torch.float16, (8, 0), True),
        (128, torch.float16, (7, 5), False),
        (128, torch.float32, (9, 0), False),
        (20, torch.bfloat16, (9, 0), False),
        (512, torch.bfloat16, (9, 0), False),
    ],
)
def test_where_the_variable_length_kernel_runs(
    head_dim: int, dtype: torch.dtype, capability: tuple[int, int], fits: bool
) -> None:
    """A GPU before sm_80, or heads that FlashAttention does not take, once ended in the kernel's own error."""
    assert fits_varlen(torch.empty(2, 1, head_dim, dtype=dtype), capability) is fits


@pytest.mark.parametrize(("most", "calls"), [(REACH, [(4, 16)]), (6 * 4 * 8, [(4, 4)]), (6 * 4 * 8 - 1, [(2, 2)] * 2)])
def test_views_that_reach_too_far_become_tensors_of_their_own(most: int, calls: list[tuple[int, int]]) -> None:
    """Outputs and gradients stay; a kernel sees all heads as they are, copied, or in groups with their keys.

    calls: query heads, and heads from one token to the next, of each.
    """
    torch.manual_seed(0)
    fused = torch.randn(6, 16, 8, requires_grad=True)
    tensors = fused[:, :4], fused[:, 4:6], fused[:, 6:8]  # the rest: a projection wider than its heads
    seen = []

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.append((query.shape[1], query.stride(0) // 8))
        return attend_one(query, key, value, None)

    out = within_reach(kernel, *tensors, most=most)
    grad = torch.randn_like(out)
    expected = attend_one(*tensors, None)
    assert seen == calls
    torch.testing.assert_close(out, expected)
    ours, theirs = (torch.autograd.grad(x, fused, grad, retain_graph=True)[0] for x in (out, expected))
    torch.testing.assert_close(ours, theirs)

"""Causal attention of whole prompts that have nothing in the cache: over the new keys themselves, not over pages.

Torch's FlashAttention 2 for documents of any lengths takes them as they come out of the projections.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_FIRST_CAPABILITY = (8, 0)
_WIDEST_HEAD = 256


def fits_fresh(query_TNH: Tensor, key_TKH: Tensor) -> bool:
    """Whether `attend_fresh` takes these: FlashAttention 2's limits. False off the GPU."""
    head_dim = query_TNH.shape[-1]
    in_16_bits = query_TNH.dtype in (torch.float16, torch.bfloat16) and key_TKH.dtype == query_TNH.dtype
    return query_TNH.is_cuda and in_16_bits and head_dim % 8 == 0 and head_dim <= _WIDEST_HEAD and _has_flash()


def attend_fresh(
    query_TNH: Tensor,
    key_TKH: Tensor,
    value_TKH: Tensor,
    query_starts_R1: Tensor,
    max_query: int,
    window: int | None,
    scale: float | None = None,
) -> Tensor:
    """out_TNH: every request's tokens over the same request's tokens up to their own.

    Only for batches in which no request has anything in the cache (each context is its number of new tokens), and
    where `fits_fresh` says so; rows beyond query_starts[-1] come out as anything. window: as in `paged_attention`.
    """
    out = torch.ops.aten._flash_attention_forward(
        query_TNH,
        key_TKH,
        value_TKH,
        query_starts_R1,
        query_starts_R1,
        max_query,
        max_query,
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )[0]
    assert isinstance(out, Tensor)
    return out


@cache
def _has_flash() -> bool:
    """Whether torch has the kernel here: not in every build, and not on chips before Ampere."""
    if not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability() >= _FIRST_CAPABILITY

"""Attention over packed documents through torch's FlexAttention, which compiles a kernel for the mask.

Compiling takes some twenty seconds for the first shape, so it is measured beside the others only where a recipe allows
that (train.flex_attention). The mask is given as blocks of 128 x 128, laid out from the documents' bounds alone: which
are looked at, and which of them are seen whole. Nothing of tokens x tokens is made.
Source: arXiv 2412.05496, section 3 (block masks).
"""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.model.packed import PackedTokens
from tunesmith.units import ceil_div

BLOCK = 128
_Known = tuple[weakref.ref[PackedTokens], int | None, Any]
_known: list[_Known] = []
_REMEMBERED = 2
"""Packs whose masks are kept: every layer of a pass asks for the same one, or for one of two windows."""


def attend_flex(
    query_TNH: Tensor, key_TKH: Tensor, value_TKH: Tensor, pack: PackedTokens, window: int | None
) -> Tensor:
    """out_TNH: every document sees itself, causally, the last `window` positions (None: all). Compiled on a GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    attend: Any = _compiled() if query_TNH.is_cuda else flex_attention
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query_TNH, key_TKH, value_TKH))
    grouped = query.shape[1] != key.shape[1]
    out = attend(query, key, value, block_mask=_mask_of(pack, window, query.device), enable_gqa=grouped)
    return out[0].transpose(0, 1)


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _mask_of(pack: PackedTokens, window: int | None, device: torch.device) -> Any:
    for known, of_window, mask in _known:
        if known() is pack and of_window == window:
            return mask
    mask = block_mask(pack.lengths, window, device)
    _known.insert(0, (weakref.ref(pack), window, mask))
    del _known[_REMEMBERED:]
    return mask


def block_mask(lengths: tuple[int, ...], window: int | None, device: torch.device) -> Any:
    """torch's BlockMask of documents of these lengths."""
    from torch.nn.attention.flex_attention import BlockMask

    num_tokens = sum(lengths)
    partial, whole = (_as_tables(mask, device) for mask in seen_blocks(lengths, window))
    documents = np.repeat(np.arange(len(lengths)), lengths)
    document_T = torch.from_numpy(documents.astype(np.int32)).to(device, non_blocking=True)

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (document_T[query] == document_T[key]) & (key <= query)
        return seen if window is None else seen & (key > query - window)

    sizes = (num_tokens, num_tokens)
    return BlockMask.from_kv_blocks(*partial, *whole, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=sizes)


def seen_blocks(lengths: tuple[int, ...], window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """bool [blocks of queries, blocks of keys], twice: blocks seen in part, and blocks that every query sees whole."""
    num_tokens = sum(lengths)
    num_blocks = ceil_div(num_tokens, BLOCK)
    starts_T = np.repeat(np.cumsum((0, *lengths[:-1])), lengths)
    first = np.arange(num_blocks) * BLOCK
    last = np.minimum(first + BLOCK, num_tokens) - 1
    reach = num_tokens if window is None else window
    # The first query of a block reaches back the farthest, the last one the least.
    seen_from = np.maximum(starts_T[first], first - reach + 1)
    whole_from = np.maximum(starts_T[last], last - reach + 1)
    blocks = np.arange(num_blocks)
    seen = (blocks[None, :] >= (seen_from // BLOCK)[:, None]) & (blocks[None, :] <= blocks[:, None])
    whole = (first[None, :] >= whole_from[:, None]) & (blocks[None, :] < blocks[:, None])
    return seen & ~whole, whole


def _as_tables(mask: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, int32 [1, 1, B], and which, in order, int32 [1, 1, B, B]."""
    order = np.argsort(~mask, axis=1, kind="stable")
    counts, which = (torch.from_numpy(table.astype(np.int32))[None, None] for table in (mask.sum(axis=1), order))
    return counts.to(device, non_blocking=True), which.to(device, non_blocking=True)

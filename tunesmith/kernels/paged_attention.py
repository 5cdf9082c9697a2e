"""Attention of a step's new tokens over the pages of the key/value cache, several requests at once.

    out_i = softmax(scale * q_i . k_j) v_j,      j over the positions of the same request up to the query's own

Request r's new tokens are the rows query_starts[r] ... query_starts[r + 1] of the batch; they are its last positions,
context[r] - count ... context[r] - 1, and their keys and values are in the pages already:

    position j of request r:   page block_tables[r, j // S], slot j % S

A window w keeps the last w positions, the query's own among them. Pages of fp8 hold codes: key = code * scale of its
page and head. Query heads are in groups of N / K that share a key head.
Source: arXiv 1706.03762, section 3.2.1; pages: arXiv 2309.06180, section 4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.kernels.direct import direct
from tunesmith.kernels.nf4 import use_kernel
from tunesmith.kernels.paged_attention_cpu import paged_attention_cpu
from tunesmith.units import ceil_div


def paged_attention(
    query_TNH: Tensor,
    keys_PSKH: Tensor,
    values_PSKH: Tensor,
    block_tables_RP: Tensor,
    query_starts_R1: Tensor,
    context_R: Tensor,
    *,
    max_query: int,
    max_context: int,
    window: int | None,
    scale: float | None = None,
    key_scales_PK: Tensor | None = None,
    value_scales_PK: Tensor | None = None,
    out: Tensor | None = None,
    invariant: bool = False,
    min_query: int = 1,
    arrivals: Tensor | None = None,
) -> Tensor:
    """out_TNH, of the query's dtype; computed in float32.

    Args: query_TNH: strides of tokens and heads are free. keys_PSKH, values_PSKH: contiguous pages. block_tables_RP,
    query_starts_R1, context_R: int32, on the query's device. max_query: at least the most new tokens of a request,
    max_context: at least the longest context; work is laid out by them, so that nothing is read back from the device.
    min_query: at most the fewest new tokens of a request: where all have many, the kernels of few are not launched.
    arrivals: int32, zeros before and after, for this call and no other at the same time: the program of a context's
    parts that ends last joins them, and no second kernel does. Without it, and where there are more requests x key
    heads than it has numbers, one does.
    scale: of the scores, 1 / sqrt(H) unless given. key_scales_PK, value_scales_PK: float32, for pages of fp8.
    out: where to write, else it is allocated. invariant: a request's result does not depend on what else is in the
    batch, nor on max_context.
    Rows beyond query_starts[-1], padding, come out as anything.
    """
    scale = query_TNH.shape[-1] ** -0.5 if scale is None else scale
    if use_kernel(query_TNH.device):
        from tunesmith.kernels.paged_attention_operator import paged_attention_operator

        out = query_TNH.new_empty(query_TNH.shape) if out is None else out
        direct(paged_attention_operator, query_TNH)(
            query_TNH,
            keys_PSKH,
            values_PSKH,
            block_tables_RP,
            query_starts_R1,
            context_R,
            key_scales_PK,
            value_scales_PK,
            out,
            max_query,
            max_context,
            window,
            scale,
            invariant,
            arrivals,
            min_query,
        )
        return out
    if query_TNH.device.type == "cpu" and key_scales_PK is None and not invariant:
        return paged_attention_cpu(
            query_TNH,
            keys_PSKH,
            values_PSKH,
            block_tables_RP,
            query_starts_R1,
            context_R,
            window=window,
            scale=scale,
            out=out,
        )
    result = paged_attention_reference(
        query_TNH,
        keys_PSKH,
        values_PSKH,
        block_tables_RP,
        query_starts_R1,
        context_R,
        window=window,
        scale=scale,
        key_scales_PK=key_scales_PK,
        value_scales_PK=value_scales_PK,
    )
    return result if out is None else out.copy_(result)


def paged_attention_reference(
    query_TNH: Tensor,
    keys_PSKH: Tensor,
    values_PSKH: Tensor,
    block_tables_RP: Tensor,
    query_starts_R1: Tensor,
    context_R: Tensor,
    *,
    window: int | None,
    scale: float,
    key_scales_PK: Tensor | None = None,
    value_scales_PK: Tensor | None = None,
) -> Tensor:
    """paged_attention by plain torch in float32, one request after the other: the truth for every other way."""
    out_TNH = torch.zeros_like(query_TNH, memory_format=torch.contiguous_format)
    starts, contexts = query_starts_R1.tolist(), context_R.tolist()
    for request, context in enumerate(contexts):
        start, end = starts[request], starts[request + 1]
        if start == end:
            continue
        pages = block_tables_RP[request, : ceil_div(context, keys_PSKH.shape[1])].long()
        key_SKH = _held(keys_PSKH, pages, key_scales_PK)[:context]
        value_SKH = _held(values_PSKH, pages, value_scales_PK)[:context]
        out_TNH[start:end] = _attend(query_TNH[start:end], key_SKH, value_SKH, window, scale)
    return out_TNH


def _held(pages_PSKH: Tensor, pages: Tensor, scales_PK: Tensor | None) -> Tensor:
    """The keys or values [S, K, H] of these pages, float32."""
    held = pages_PSKH[pages].float()
    if scales_PK is not None:
        held = held * scales_PK[pages][:, None, :, None]
    return held.flatten(0, 1)


def _attend(query_TNH: Tensor, key_SKH: Tensor, value_SKH: Tensor, window: int | None, scale: float) -> Tensor:
    """The last T of S positions over all S, causally and within the window."""
    num_queries, num_heads, head_dim = query_TNH.shape
    num_keys, num_kv_heads, _ = key_SKH.shape
    query_KGTH = query_TNH.float().view(num_queries, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    scores = query_KGTH @ key_SKH.permute(1, 2, 0)[:, None] * scale
    position = torch.arange(num_keys - num_queries, num_keys, device=query_TNH.device)[:, None]
    seen = torch.arange(num_keys, device=query_TNH.device)[None, :]
    mask = seen <= position
    if window is not None:
        mask &= seen > position - window
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    mixed = weights @ value_SKH.permute(1, 0, 2)[:, None]
    return mixed.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim).to(query_TNH.dtype)

"""Attention over pages on a CPU, by torch's kernels.

Requests with one new token go together: their pages are gathered to [R, S, K, H], as long as the longest, and the query
heads of one key head are rows of one product, so nothing is repeated. A request whose pages lie side by side needs no
gathering when it is alone. Requests with more new tokens go one after the other. What only depends on where things lie
(indices, masks) is made once for a step and serves all its layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.units import ceil_div

_MOST_PLANS = 4


@dataclass(frozen=True)
class _Layout:
    """What a plan is made from, copied: whoever owns the tensors may write over them."""

    tables_RP: Tensor
    starts_R1: Tensor
    context_R: Tensor
    slots: int
    window: int | None
    dtype: torch.dtype

    def fits(
        self, tables: Tensor, starts: Tensor, context: Tensor, slots: int, window: int | None, dtype: torch.dtype
    ) -> bool:
        """Whether a plan of this layout serves these."""
        return (
            self.window == window
            and self.slots == slots
            and self.dtype == dtype
            and torch.equal(self.context_R, context)
            and torch.equal(self.tables_RP, tables)
            and torch.equal(self.starts_R1, starts)
        )


@dataclass(frozen=True)
class _Several:
    """One request with several new tokens: rows start ... end, over its pages from the first in reach.

    mask: [T, S], or None where the plain causal order serves.
    """

    start: int
    end: int
    pages: Tensor
    num_keys: int
    mask: Tensor | None


@dataclass(frozen=True)
class _Single:
    """The requests with one new token. rows: of the batch, or None where these are all of them.

    pages: of all requests, one after the other, each as many; first: where they lie side by side, for one request.
    mask: added to the scores [R, 1, 1, S], None where every key is seen; empty: gathered slots that nobody wrote.
    """

    rows: Tensor | None
    num_requests: int
    pages: Tensor
    first: int | None
    num_keys: int
    mask: Tensor | None
    empty: Tensor | None


@dataclass(frozen=True)
class _Plan:
    layout: _Layout
    single: _Single | None
    several: tuple[_Several, ...] = field(default=())


_plans: list[_Plan] = []


def paged_attention_cpu(
    query_TNH: Tensor,
    keys_PSKH: Tensor,
    values_PSKH: Tensor,
    block_tables_RP: Tensor,
    query_starts_R1: Tensor,
    context_R: Tensor,
    *,
    window: int | None,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """See tunesmith.kernels.paged_attention.paged_attention."""
    slots, dtype = keys_PSKH.shape[1], query_TNH.dtype
    plan = _plan_of(block_tables_RP, query_starts_R1, context_R, slots, window, dtype)
    single = plan.single
    if single is not None and single.rows is None and query_TNH.shape[0] == single.num_requests:
        result = _attend_single(query_TNH, keys_PSKH, values_PSKH, single, scale)
        return result if out is None else out.copy_(result)
    out = torch.empty_like(query_TNH, memory_format=torch.contiguous_format) if out is None else out
    if single is not None:
        rows = slice(0, single.num_requests) if single.rows is None else single.rows
        out[rows] = _attend_single(query_TNH[rows], keys_PSKH, values_PSKH, single, scale)
    for request in plan.several:
        rows_of_it = slice(request.start, request.end)
        out[rows_of_it] = _attend_several(query_TNH[rows_of_it], keys_PSKH, values_PSKH, request, scale)
    return out


def _attend_single(query_RNH: Tensor, keys_PSKH: Tensor, values_PSKH: Tensor, single: _Single, scale: float) -> Tensor:
    num_requests, num_heads, head_dim = single.num_requests, *query_RNH.shape[1:]
    num_kv_heads = keys_PSKH.shape[2]
    if single.first is not None:
        start = single.first
        key, value = (
            pages.view(-1, num_kv_heads, head_dim)[start : start + single.num_keys][None]
            for pages in (keys_PSKH, values_PSKH)
        )
    else:
        key, value = (
            pages.index_select(0, single.pages).view(num_requests, -1, num_kv_heads, head_dim)
            for pages in (keys_PSKH, values_PSKH)
        )
        if single.empty is not None:
            value.view(-1, num_kv_heads, head_dim).index_fill_(0, single.empty, 0.0)
            key.view(-1, num_kv_heads, head_dim).index_fill_(0, single.empty, 0.0)
    out = F.scaled_dot_product_attention(
        query_RNH.reshape(num_requests, num_kv_heads, -1, head_dim),
        key.to(query_RNH.dtype).transpose(1, 2),
        value.to(query_RNH.dtype).transpose(1, 2),
        attn_mask=single.mask,
        scale=scale,
    )
    return out.reshape(num_requests, num_heads, head_dim)


def _attend_several(query_TNH: Tensor, keys: Tensor, values: Tensor, request: _Several, scale: float) -> Tensor:
    key, value = (
        pages.index_select(0, request.pages).flatten(0, 1)[: request.num_keys].to(query_TNH.dtype)
        for pages in (keys, values)
    )
    out = F.scaled_dot_product_attention(
        query_TNH.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=request.mask,
        is_causal=request.mask is None,
        scale=scale,
        enable_gqa=query_TNH.shape[1] != keys.shape[2],
    )
    return out[0].transpose(0, 1)


def _plan_of(
    tables: Tensor, starts: Tensor, context: Tensor, slots: int, window: int | None, dtype: torch.dtype
) -> _Plan:
    for plan in _plans:
        if plan.layout.fits(tables, starts, context, slots, window, dtype):
            return plan
    plan = _make(_Layout(tables.clone(), starts.clone(), context.clone(), slots, window, dtype))
    # A step's plans, one for each window, come anew with every step.
    _plans.insert(0, plan)
    del _plans[_MOST_PLANS:]
    return plan


def _make(layout: _Layout) -> _Plan:
    starts, contexts = layout.starts_R1.tolist(), layout.context_R.tolist()
    requests = [(request, starts[request], starts[request + 1]) for request in range(len(contexts))]
    singles = [request for request, start, end in requests if end - start == 1]
    several = tuple(
        _several(layout, request, start, end, contexts[request]) for request, start, end in requests if end - start > 1
    )
    if not singles:
        return _Plan(layout, None, several)
    rows = None
    if several or len(singles) < len(requests):
        rows = torch.tensor([starts[request] for request in singles])
    return _Plan(layout, _single(layout, singles, contexts, rows), several)


def _several(layout: _Layout, request: int, start: int, end: int, context: int) -> _Several:
    """The first page in reach is that of the first new token's window."""
    before, window, slots = context - (end - start), layout.window, layout.slots
    first = 0 if window is None else max(0, before - window + 1) // slots
    pages = layout.tables_RP[request, first : ceil_div(context, slots)].long()
    num_keys = context - first * slots
    if before == 0 and (window is None or window >= context):
        return _Several(start, end, pages, num_keys, None)
    position = torch.arange(before, context)[:, None]
    key = torch.arange(first * slots, context)[None, :]
    mask = key <= position
    if window is not None:
        mask &= key > position - window
    return _Several(start, end, pages, num_keys, _added(mask, layout.dtype))


def _single(layout: _Layout, singles: list[int], contexts: list[int], rows: Tensor | None) -> _Single:
    """Pages are numbered from the first in reach of any request; behind a request's last, its last is repeated."""
    slots, window = layout.slots, layout.window
    context = layout.context_R[singles].long()[:, None]
    begin = 0 if window is None else max(0, min(contexts[request] for request in singles) - window) // slots
    end = ceil_div(max(contexts[request] for request in singles), slots)
    last = (context - 1) // slots
    column = torch.arange(begin, end)[None, :].minimum(last)
    pages = layout.tables_RP[singles].long().gather(1, column)
    position = torch.arange(begin * slots, end * slots)[None, :]
    written = position < context
    seen = written if window is None else written & (position >= context - window)
    first = _side_by_side(pages[0], slots) if len(singles) == 1 else None
    if first is not None:
        skipped = 0 if window is None else max(0, contexts[singles[0]] - window - begin * slots)
        num_keys = contexts[singles[0]] - begin * slots - skipped
        return _Single(rows, 1, pages.flatten(), first + skipped, num_keys, None, None)
    mask = None if bool(seen.all()) else _added(seen, layout.dtype)[:, None, None]
    empty = None if bool(written.all()) else (~written).flatten().nonzero().flatten()
    return _Single(rows, len(singles), pages.flatten(), None, (end - begin) * slots, mask, empty)


def _side_by_side(pages: Tensor, slots: int) -> int | None:
    """The first slot, where each page is the next of the one before."""
    numbers: list[int] = pages.tolist()
    is_run = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return numbers[0] * slots if is_run else None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a key is seen, -inf where not."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))

"""Attention over pages: what the engine passes to the decoder in place of `PackedAttention`.

new keys, values --write--> the requests' pages --view or gather--> attention of the new queries over them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.engine.pages import PAGE_SLOTS, PagedCache, PageTable
from tunesmith.model.attention import AttendLayer, attend_one


@dataclass(frozen=True)
class Span:
    """One request's part of a step: its last `num_new` positions are computed now, `length` are then in its pages."""

    num_new: int
    length: int
    start: int | None
    slots: Tensor | None

    @staticmethod
    def of(table: PageTable, num_new: int, device: torch.device) -> Span:
        """The span of a table that was just extended by `num_new` tokens."""
        if table.contiguous:
            return Span(num_new, table.length, table.pages[0] * PAGE_SLOTS, None)
        slots = torch.tensor(table.slots(0, table.length), device=device)
        return Span(num_new, table.length, None, slots)

    def write(self, storage_LKH: Tensor, new_TKH: Tensor) -> None:
        """Put the new rows into their slots of the flat storage."""
        if self.start is not None:
            end = self.start + self.length
            storage_LKH[end - self.num_new : end] = new_TKH
        elif self.slots is not None:
            storage_LKH.index_copy_(0, self.slots[-self.num_new :], new_TKH)

    def read(self, storage_LKH: Tensor, window: int | None) -> Tensor:
        """All rows in reach of the new queries: a view where pages lie side by side, else a gathered copy."""
        skipped = 0 if window is None else max(0, self.length - self.num_new - window + 1)
        if self.start is not None:
            return storage_LKH[self.start + skipped : self.start + self.length]
        assert self.slots is not None
        return storage_LKH[self.slots[skipped:]]


class PagedAttention:
    """Attention of one step: every request's new queries over that request's pages, causally, within the window."""

    def __init__(self, cache: PagedCache, spans: Sequence[Span]) -> None:
        self.cache = cache
        self.spans = spans
        self.lengths = [span.num_new for span in spans]

    def __getitem__(self, layer: int) -> AttendLayer:
        window = self.cache.config.window(layer)
        keys, values = self.cache.flat[layer]

        def attend(query_TNH: Tensor, key_TKH: Tensor, value_TKH: Tensor) -> Tensor:
            if len(self.spans) == 1:
                return _attend_span(self.spans[0], keys, values, query_TNH, key_TKH, value_TKH, window)
            parts = zip(
                self.spans,
                query_TNH.split(self.lengths),
                key_TKH.split(self.lengths),
                value_TKH.split(self.lengths),
                strict=True,
            )
            return torch.cat([_attend_span(span, keys, values, q, k, v, window) for span, q, k, v in parts])

        return attend


def _attend_span(
    span: Span, keys: Tensor, values: Tensor, query: Tensor, key: Tensor, value: Tensor, window: int | None
) -> Tensor:
    span.write(keys, key)
    span.write(values, value)
    if span.num_new == span.length:
        return attend_one(query, key, value, window)
    seen_keys, seen_values = span.read(keys, window), span.read(values, window)
    if span.num_new == 1:
        return attend_last(query, seen_keys, seen_values)
    return attend_one(query, seen_keys, seen_values, window)


def attend_last(query_1NH: Tensor, key_SKH: Tensor, value_SKH: Tensor) -> Tensor:
    """The attention of one query that sees every key given: `attend_one` without a mask.

    Heads that share a key/value head are laid along the query axis, so that nothing is repeated:
    [1, N, H] -> [K, N / K, H] against [K, S, H].
    """
    num_kv_heads, head_dim = key_SKH.shape[1:]
    out = F.scaled_dot_product_attention(
        query_1NH.view(1, num_kv_heads, -1, head_dim), key_SKH.transpose(0, 1)[None], value_SKH.transpose(0, 1)[None]
    )
    return out.reshape(query_1NH.shape)

"""The keys and values of the sequences that decode on a CPU, held once more as one row each: [N, C, K, H].

Attention over pages would gather all pages of all sequences in every layer of every step. Here a step adds its new
tokens to rows that are there already, and attention reads a view:

    sequence slot 0   k0 k1 k2 ...            keys[slot, :context]
                  1   k0 k1 ...

A row is what its pages hold as long as the sequence in that slot goes on by one token in the same pages, step after
step. Where it did anything else (a prompt, guesses, or left) the row is forgotten, and made from the pages when the
slot decodes next: equal pages alone say nothing, since others may have filled them meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.engine.batch import StepBatch
from tunesmith.engine.pages import PagedCache
from tunesmith.units import ceil_div

_ROUND = 64
_MOST_SHARE = 0.125
"""Rows take at most this share of the machine's memory; where they would take more, pages are gathered."""
_MOST_WASTE = 3
"""Rows are as long as the longest: where that is more than so many times what there is to read, pages are gathered."""


@dataclass(frozen=True)
class HeldStep:
    """One step's places. rows: slots below which all sequences lie.

    places: where the new tokens go, rows of [N * C]; slots: None where the batch's order is that of the slots.
    views: of every layer the keys and values that are read, [N, K, C, H]. stale: slots to be filled from their pages.
    """

    rows: int
    views: list[tuple[Tensor, Tensor]]
    places: Tensor
    slots: Tensor | None
    masks: dict[int | None, Tensor | None]
    stale: list[tuple[int, int, Tensor]]


class HeldRows:
    """The rows of one cache."""

    def __init__(self, cache: PagedCache, max_num_seqs: int, max_model_len: int) -> None:
        self.cache = cache
        self.max_num_seqs, self.max_model_len = max_num_seqs, max_model_len
        self.most_bytes = _MOST_SHARE * psutil.virtual_memory().total
        config = cache.config
        self.windows = {config.window(layer) for layer in range(config.num_hidden_layers)}
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.pages_flat = [tuple(t.flatten(0, 1) for t in pair) for pair in zip(cache.keys, cache.values, strict=True)]
        self.rows_flat: list[tuple[Tensor, ...]] = []
        self.viewed: tuple[tuple[int, int], list[tuple[Tensor, Tensor]]] = ((0, 0), [])
        self.capacity = (0, 0)
        self.pages: list[np.ndarray] = [np.zeros(0, dtype=np.int32)] * max_num_seqs
        self.lengths = [0] * max_num_seqs

    def begin(self, batch: StepBatch) -> HeldStep | None:
        """What a step of single tokens needs, made once for all layers; None where rows don't serve it."""
        slots, contexts = list(batch.sequence_slots), batch.context_R.tolist()
        rows, longest = max(slots) + 1, max(contexts)
        is_sparse = rows * longest > _MOST_WASTE * sum(contexts) or len(set(slots)) < len(slots)
        if is_sparse or not self._make_room(rows, longest):
            self.forget(slots)
            return None
        stale = self._refresh(batch, slots, contexts)
        columns = min(self.capacity[1], ceil_div(longest, 16) * 16)
        order = torch.tensor(slots)
        places = order * self.capacity[1] + batch.context_R - 1
        masks = {window: self._mask(window, rows, columns, order, batch.context_R) for window in self.windows}
        return HeldStep(
            rows, self._views(rows, columns), places, None if slots == list(range(rows)) else order, masks, stale
        )

    def forget(self, slots: Sequence[int]) -> None:
        """These slots' pages were written, or will be, without their rows."""
        for slot in slots:
            self.lengths[slot] = -1

    def _views(self, rows: int, columns: int) -> list[tuple[Tensor, Tensor]]:
        """Made anew every sixteenth step."""
        if self.viewed[0] != (rows, columns):
            pairs = zip(self.keys, self.values, strict=True)
            views = [tuple(t[:rows, :columns].transpose(1, 2) for t in pair) for pair in pairs]
            self.viewed = ((rows, columns), cast(list[tuple[Tensor, Tensor]], views))
        return self.viewed[1]

    def _refresh(self, batch: StepBatch, slots: list[int], contexts: list[int]) -> list[tuple[int, int, Tensor]]:
        """The rows that don't hold what their pages do: slot, tokens, pages. They will, with the new token."""
        tables, stale = batch.block_tables_RP.numpy(), []
        page_slots = self.cache.keys[0].shape[1]
        for request, (slot, context) in enumerate(zip(slots, contexts, strict=True)):
            table = tables[request, : ceil_div(context, page_slots)]
            before = table[: ceil_div(context - 1, page_slots)]
            is_held = self.lengths[slot] == context - 1 and np.array_equal(self.pages[slot], before)
            if not is_held:
                stale.append((slot, context - 1, torch.from_numpy(before.astype(np.int64))))
            self.lengths[slot] = context
            if not is_held or len(table) > len(before):
                self.pages[slot] = table.copy()
        return stale

    def _mask(self, window: int | None, rows: int, columns: int, slots: Tensor, context_R: Tensor) -> Tensor | None:
        """0 where a key is seen, -inf where not; a row without a sequence sees its first key."""
        context = torch.ones(rows, dtype=torch.int64).index_copy_(0, slots, context_R.long())[:, None]
        position = torch.arange(columns)[None, :]
        seen = position < context
        if window is not None:
            seen &= position >= context - window
        if bool(seen.all()):
            return None
        mask = torch.zeros(rows, columns, dtype=self.keys[0].dtype).masked_fill_(~seen, float("-inf"))
        return mask[:, None, None]

    def attend(
        self,
        step: HeldStep,
        layer: int,
        query_RNH: Tensor,
        key_RKH: Tensor,
        value_RKH: Tensor,
        slots_R: Tensor,
        window: int | None,
    ) -> Tensor:
        """out [R, N * H] of the new tokens, which are put into their rows, and into slots_R of the pages."""
        keys, values = self.keys[layer], self.values[layer]
        for slot, length, pages in step.stale:
            self._fill(keys[slot], self.cache.keys[layer], length, pages)
            self._fill(values[slot], self.cache.values[layer], length, pages)
        for pages, rows, new_RKH in zip(
            self.pages_flat[layer], self.rows_flat[layer], (key_RKH, value_RKH), strict=True
        ):
            pages.index_copy_(0, slots_R, new_RKH)
            rows.index_copy_(0, step.places, new_RKH)
        num, num_heads, head_dim = query_RNH.shape
        query = query_RNH.view(num, keys.shape[2], -1, head_dim)
        if step.slots is not None:
            query = query.new_zeros(step.rows, *query.shape[1:]).index_copy_(0, step.slots, query)
        out = F.scaled_dot_product_attention(query, *step.views[layer], attn_mask=step.masks[window])
        if step.slots is not None:
            out = out.index_select(0, step.slots)
        return out.view(num, num_heads * head_dim)

    @staticmethod
    def _fill(row_CKH: Tensor, pages_PSKH: Tensor, length: int, pages: Tensor) -> None:
        """The row as the pages are; behind it nothing that is not a number."""
        row_CKH[length:].zero_()
        if length:
            row_CKH[:length] = pages_PSKH.index_select(0, pages).flatten(0, 1)[:length]

    def _make_room(self, rows: int, columns: int) -> bool:
        """Rows and columns for these; what there is stays. False where they would take too much."""
        if rows <= self.capacity[0] and columns <= self.capacity[1]:
            return True
        rows = min(self.max_num_seqs, max(self.capacity[0], 1 << (rows - 1).bit_length()))
        columns = max(self.capacity[1], ceil_div(min(self.max_model_len, columns + columns // 2), _ROUND) * _ROUND)
        config, dtype = self.cache.config, self.cache.dtype
        shape = (rows, columns, config.num_key_value_heads, config.head_dim)
        if 2 * config.num_hidden_layers * dtype.itemsize * float(np.prod(shape)) > self.most_bytes:
            return False
        self.keys, self.values = (self._grown(old, shape) for old in (self.keys, self.values))
        self.rows_flat = [tuple(t.flatten(0, 1) for t in pair) for pair in zip(self.keys, self.values, strict=True)]
        self.capacity, self.viewed = (rows, columns), ((0, 0), [])
        return True

    def _grown(self, old: list[Tensor], shape: tuple[int, ...]) -> list[Tensor]:
        grown = [torch.zeros(shape, dtype=self.cache.dtype) for _ in range(self.cache.config.num_hidden_layers)]
        for before, after in zip(old, grown, strict=False):
            after[: before.shape[0], : before.shape[1]] = before
        return grown

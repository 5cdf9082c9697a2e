"""Attention on a CPU where every row is a sequence of its own: one call for each, so that its bits are its own.

Which keys a call reads, and in what shape, is a function of the row's position alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.engine.batch import StepBatch
from tunesmith.engine.pages import PAGE_SLOTS, pages_of


@dataclass(frozen=True)
class Row:
    """The slots of one row's sequence up to its own: a stretch `start` .. `start + length`, or `slots` one by one."""

    length: int
    start: int | None
    slots: Tensor | None

    def read(self, pages_PSKH: Tensor, window: int | None) -> Tensor:
        """[S, K, H] in reach of the row: a view where its pages lie side by side, else a copy."""
        flat = pages_PSKH.flatten(0, 1)
        skipped = 0 if window is None else max(0, self.length - window)
        if self.start is not None:
            return flat[self.start + skipped : self.start + self.length]
        assert self.slots is not None
        return flat[self.slots[skipped:]]


def rows_of(batch: StepBatch) -> list[Row]:
    """Where each row's keys are; the same for all layers. The batch has one new token of each sequence."""
    offsets = torch.arange(PAGE_SLOTS)
    rows = []
    for table_P, length in zip(batch.block_tables_RP, batch.context_R.tolist(), strict=True):
        pages = table_P[: pages_of(length)].long()
        first = int(pages[0])
        if bool((pages == torch.arange(first, first + len(pages))).all()):
            rows.append(Row(length, first * PAGE_SLOTS, None))
        else:
            rows.append(Row(length, None, (pages[:, None] * PAGE_SLOTS + offsets).view(-1)[:length]))
    return rows


def attend_rows(
    query_TNH: Tensor, keys_PSKH: Tensor, values_PSKH: Tensor, rows: list[Row], window: int | None
) -> Tensor:
    """out_TNH: each row's query over its own keys. Heads that share a key head are laid along the query axis."""
    num_heads, head_dim = query_TNH.shape[1:]
    grouped_TKGH = query_TNH.reshape(len(rows), keys_PSKH.shape[2], -1, head_dim)
    out_TKGH = torch.empty_like(grouped_TKGH)
    for place, row in enumerate(rows):
        key_KSH = row.read(keys_PSKH, window).transpose(0, 1)
        value_KSH = row.read(values_PSKH, window).transpose(0, 1)
        out_TKGH[place] = F.scaled_dot_product_attention(grouped_TKGH[place][None], key_KSH[None], value_KSH[None])[0]
    return out_TKGH.view(len(rows), num_heads, head_dim)

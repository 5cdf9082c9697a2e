"""Random batches over pages, with NaN wherever nothing may be read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.kernels.fp8_weight import FP8
from tunesmith.kernels.paged_attention import paged_attention_reference
from tunesmith.units import ceil_div

SLOTS = 16


@dataclass
class PagedBatch:
    """The tensors of one step."""

    query: Tensor
    keys: Tensor
    values: Tensor
    tables: Tensor
    starts: Tensor
    context: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def max_query(self) -> int:
        """The most new tokens of a request."""
        return int(self.starts.diff().max())

    @property
    def max_context(self) -> int:
        """The longest context."""
        return int(self.context.max())

    def truth(self, window: int | None = None) -> Tensor:
        """The reference's output, of the rows that belong to requests."""
        scales = {"key_scales_PK": self.key_scales, "value_scales_PK": self.value_scales}
        pages = (self.query, self.keys, self.values, self.tables, self.starts, self.context)
        out = paged_attention_reference(*pages, window=window, scale=self.query.shape[2] ** -0.5, **scales)
        return out[: int(self.starts[-1])]

    def of(self, request: int) -> PagedBatch:
        """A batch of this request alone."""
        start, end = self.starts[request : request + 2].tolist()
        starts = torch.tensor([0, end - start], dtype=torch.int32, device=self.starts.device)
        rows = slice(request, request + 1)
        pages = (self.keys, self.values, self.tables[rows].contiguous(), starts, self.context[rows].contiguous())
        return PagedBatch(self.query[start:end].contiguous(), *pages, self.key_scales, self.value_scales)


def make_batch(
    counts: list[int],
    contexts: list[int],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    fp8: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> PagedBatch:
    """Requests with so many new tokens and so long contexts; heads: query heads, key heads, head size.

    Pages are in random order; two rows of padding follow the requests' rows, and the heads' rows are a part of a
    wider projection.
    """
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads, head_dim = heads
    needed = [ceil_div(context, SLOTS) for context in contexts]
    num_pages = sum(needed) + 3
    order = torch.randperm(num_pages, generator=generator)
    tables = torch.full((len(counts), max(needed) + 1), -7, dtype=torch.int32)
    pages = [torch.randn(num_pages, SLOTS, num_kv_heads, head_dim, generator=generator) for _ in range(2)]
    scales: list[Tensor | None] = [None, None]
    if fp8:
        pages = [page.to(FP8) for page in pages]
        scales = [
            torch.exp2(torch.randint(-3, 3, (num_pages, num_kv_heads), generator=generator).float()) for _ in range(2)
        ]
    else:
        pages = [page.to(dtype) for page in pages]
    taken = 0
    for request, (number, context) in enumerate(zip(needed, contexts, strict=True)):
        mine = order[taken : taken + number]
        tables[request, :number] = mine
        taken += number
        for page in pages:
            if context % SLOTS:
                page[mine[-1], context % SLOTS :] = float("nan")
    for page in pages:
        page[order[taken:]] = float("nan")
    query = torch.randn(sum(counts) + 2, num_heads + 2, head_dim, generator=generator).to(dtype)[:, 1:-1]
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    moved = [
        None if t is None else t.to(device) for t in (*pages, tables, starts, torch.tensor(contexts).int(), *scales)
    ]
    return PagedBatch(query.to(device), *moved)  # type: ignore[arg-type]

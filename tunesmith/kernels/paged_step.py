"""What every kernel of attention over pages is told of a step, and of the heads that it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class HostLengths:
    """The same as a step's tensors, on the host. starts: [R + 1], contexts: [R], tables: [R, most pages]."""

    starts: np.ndarray
    contexts: np.ndarray
    tables: np.ndarray

    def first(self, num_requests: int) -> HostLengths:
        """Of the first requests alone."""
        return HostLengths(self.starts[: num_requests + 1], self.contexts[:num_requests], self.tables[:num_requests])


@dataclass(frozen=True, eq=False)
class PagedStep:
    """Where a step's requests have their keys and values: the same for all layers (`paged_attention` names the fields).

    host: None where only the device knows it, as in a recorded step. plans: what kernels keep for all layers of it.
    """

    block_tables_RP: Tensor
    query_starts_R1: Tensor
    context_R: Tensor
    max_query: int
    max_context: int
    min_query: int = 1
    host: HostLengths | None = None
    plans: dict[Any, Any] = field(default_factory=dict)

    @property
    def num_requests(self) -> int:
        """R."""
        return len(self.context_R)

    @property
    def is_decode(self) -> bool:
        """Every request has one new token."""
        return self.max_query == 1 and self.min_query == 1


@dataclass(frozen=True)
class PagedHeads:
    """What attention is for: the heads of this process, dtypes of queries and pages, and the chip.

    windows: of each layer, None for all of the context. is_shared: other processes hold the model's other heads.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    page_dtype: torch.dtype
    page_slots: int
    windows: tuple[int | None, ...]
    capability: tuple[int, int]
    is_shared: bool = False

    def refused(
        self, name: str, capabilities: tuple[tuple[int, int], tuple[int, int]], head_dims: Sequence[int]
    ) -> str | None:
        """Why a kernel that wants fp16 or bf16, such a head and a chip in such a range is not for these heads."""
        if not capabilities[0] <= self.capability < capabilities[1]:
            return f"{name} is not for chips of compute capability {'.'.join(map(str, self.capability))}"
        if self.page_dtype not in (torch.float16, torch.bfloat16):
            held = str(self.page_dtype).removeprefix("torch.")
            return f"{name} reads pages of float16 or bfloat16, and these hold {held}"
        if self.dtype != self.page_dtype:
            return f"{name} wants queries in the dtype of the pages"
        if self.head_dim not in head_dims:
            return f"{name} is not for heads of {self.head_dim}"
        return None


class PagedKernel(Protocol):
    """Another library's attention over pages.

    name: as `attention_backend` says it. version: the package's. records: whether it serves recorded steps.
    """

    name: str
    version: str
    records: bool

    def refused(self, heads: PagedHeads) -> str | None:
        """Why it is not for these heads; None where it is."""

    def serves(self, step: PagedStep) -> bool:
        """Whether it can take this step."""

    def __call__(
        self,
        query_TNH: Tensor,
        keys_PSKH: Tensor,
        values_PSKH: Tensor,
        step: PagedStep,
        *,
        window: int | None,
        scale: float,
        out: Tensor | None = None,
    ) -> Tensor:
        """out_TNH, as `paged_attention` gives it; T is query_starts[-1]."""

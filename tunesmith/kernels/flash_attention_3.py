"""Attention over pages by FlashAttention-3, where its package is installed (`flash_attn_3`, built for Hopper).

    single tokens   query [R, 1, N, H], no starts        pieces   query [T, N, H] with cu_seqlens_q
    both            k_cache, v_cache [P, S, K, H], page_table [R, pages], cache_seqlens [R]

All of it lies on the device, and nothing is asked of the host, so a step of it can be recorded. Into how many parts a
context may be split follows from the table's width, so that is cut to the longest context here; into how many each
request's own is, is decided on the device: of single tokens once for all layers (get_scheduler_metadata), else by each
call. A window w keeps w positions with the query's own: (w - 1, 0) in the library's words.
Source: arXiv 2407.08608; signatures: hopper/flash_attn_interface.py of Dao-AILab/flash-attention.
"""

from __future__ import annotations

import importlib
import sys
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from tunesmith.kernels.paged_step import PagedHeads, PagedStep
from tunesmith.units import ceil_div

NAME = "flash-attn-3"
PACKAGE, MODULE = "flash_attn_3", "flash_attn_interface"
_HOPPER = ((9, 0), (10, 0))
_HEAD_DIMS = range(8, 257, 8)


def is_installed() -> bool:
    """Whether the package is there; nothing is imported."""
    return MODULE in sys.modules or find_spec(MODULE) is not None


class FlashAttention3:
    """`flash_attn_with_kvcache`. Raises: ImportError, or OSError where its library does not fit this torch."""

    name = NAME
    records = True

    def __init__(self) -> None:
        module: Any = importlib.import_module(MODULE)
        self._attend = module.flash_attn_with_kvcache
        self._schedule = module.get_scheduler_metadata
        self.version = _version(module)

    def refused(self, heads: PagedHeads) -> str | None:
        """Pages of fp8 too: the library knows one scale for a request's key head, our pages have their own."""
        return heads.refused("FlashAttention-3", _HOPPER, _HEAD_DIMS)

    def serves(self, step: PagedStep) -> bool:
        """Every step."""
        return True

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
        """See `PagedKernel`."""
        width = ceil_div(step.max_context, keys_PSKH.shape[1])
        reach = (-1, -1) if window is None else (window - 1, 0)
        is_decode = step.is_decode and len(query_TNH) == step.num_requests
        more: dict[str, Any] = {"cu_seqlens_q": step.query_starts_R1, "max_seqlen_q": step.max_query}
        if is_decode:
            more = {"scheduler_metadata": self._scheduled(query_TNH, keys_PSKH, step, width, reach)}
        found: Tensor = self._attend(
            query_TNH[:, None] if is_decode else query_TNH,
            keys_PSKH,
            values_PSKH,
            cache_seqlens=step.context_R,
            page_table=step.block_tables_RP[:, :width],
            softmax_scale=scale,
            causal=True,
            window_size=reach,
            **more,
        )
        found = found[:, 0] if is_decode else found
        return found if out is None else out.copy_(found)

    def _scheduled(
        self, query_TNH: Tensor, keys_PSKH: Tensor, step: PagedStep, width: int, reach: tuple[int, int]
    ) -> Tensor:
        """How single tokens' contexts are split and ordered: computed on the device by the step's first such layer."""
        found: Tensor | None = step.plans.get((NAME, reach))
        if found is None:
            _, num_slots, num_kv_heads, head_dim = keys_PSKH.shape
            found = step.plans[NAME, reach] = self._schedule(
                step.num_requests,
                1,
                width * num_slots,
                query_TNH.shape[1],
                num_kv_heads,
                head_dim,
                step.context_R,
                qkv_dtype=query_TNH.dtype,
                page_size=num_slots,
                causal=True,
                window_size=reach,
            )
        assert found is not None
        return found


def _version(module: Any) -> str:
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", "unknown"))

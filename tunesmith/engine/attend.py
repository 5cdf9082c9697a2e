"""Attention over pages: what the engine passes to the decoder in place of `PackedAttention`.

new keys, values --write_kv--> the requests' pages --paged_attention--> the new queries' outputs
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from tunesmith.engine.attend_rows import attend_rows, rows_of
from tunesmith.engine.attention_backends import AttentionKernels
from tunesmith.engine.batch import FreshTail, StepBatch
from tunesmith.engine.pages import PagedCache
from tunesmith.kernels.kv_cache import write_kv
from tunesmith.kernels.paged_attention import paged_attention
from tunesmith.kernels.paged_attention_fresh import attend_fresh, fits_fresh, pays_fresh
from tunesmith.kernels.paged_step import PagedStep
from tunesmith.model.attention import AttendLayer

PRODUCTS_PER_S = 6e14
"""What a fast GPU gives, for whether a step of prompts keeps it busy for long."""


def goes_fresh(cache: PagedCache, batch: StepBatch) -> bool:
    """Whether attention of this step goes over new keys, beside pages, so that nothing of it can be recorded."""
    if batch.fresh is None or cache.key_scales is not None:
        return False
    return fits_fresh(batch.fresh.lengths, cache.config.head_dim, cache.dtype, cache.device)


class PagedAttention:
    """Attention of one pass: every request's new queries over that request's pages, causally, within the window.

    invariant: a request's result does not depend on what else is in the batch, bit for bit.
    kernels: of other libraries, to be taken where they are faster.
    """

    def __init__(
        self,
        cache: PagedCache,
        batch: StepBatch,
        *,
        invariant: bool = False,
        kernels: AttentionKernels | None = None,
    ) -> None:
        self.cache = cache
        self.batch = batch
        self.invariant = invariant
        goes_by_rows = invariant and batch.is_decode and cache.device.type == "cpu" and cache.key_scales is None
        self._rows = rows_of(batch) if goes_by_rows else None
        self._kernels = kernels
        self._steps: dict[int, PagedStep] = {}
        self._fresh = None if invariant or batch.fresh is None or not self._pays(batch.fresh) else batch.fresh

    @property
    def has_scales(self) -> bool:
        """Whether pages are fp8, whose scales `write_kv` keeps."""
        return self.cache.key_scales is not None

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, [P, S, K, H] both."""
        return self.cache.keys[layer], self.cache.values[layer]

    def __getitem__(self, layer: int) -> AttendLayer:
        def attend(query_TNH: Tensor, key_TKH: Tensor, value_TKH: Tensor) -> Tensor:
            keys, values = self.pages(layer)
            write_kv(key_TKH, value_TKH, keys, values, self.batch.slots_T, *self._scales(layer))
            return self.over_pages(layer, query_TNH)

        return attend

    def _pays(self, fresh: FreshTail) -> bool:
        config = self.cache.config
        shape = (config.num_attention_heads, config.head_dim)
        # The blocks' weights are at least twelve hidden sizes squared each.
        step_s = 24 * config.num_hidden_layers * config.hidden_size**2 * self.batch.num_tokens / PRODUCTS_PER_S
        held = self.cache.dtype, self.cache.device
        return not self.has_scales and pays_fresh(fresh.lengths, *shape, *held, step_s)

    def has_fresh(self, layer: int) -> bool:
        """Whether this layer's new keys and values are wanted as they are too, for `over_new`."""
        if self._fresh is None:
            return False
        window = self.cache.config.window(layer)
        return window is None or window >= max(self._fresh.lengths)

    def over_new(self, layer: int, query_TNH: Tensor, key_TKH: Tensor, value_TKH: Tensor) -> Tensor:
        """`over_pages` where `has_fresh`: prompts that have nothing in the cache go over their own keys."""
        fresh, batch = self._fresh, self.batch
        assert fresh is not None
        out = query_TNH.new_empty(query_TNH.shape)
        first = query_TNH.shape[0] - sum(fresh.lengths)
        if fresh.num_before:
            before = replace(
                batch,
                query_starts_R1=batch.query_starts_R1[: fresh.num_before + 1],
                context_R=batch.context_R[: fresh.num_before],
                block_tables_RP=batch.block_tables_RP[: fresh.num_before],
                max_query=fresh.max_query,
                max_context=fresh.max_context,
                host=None if batch.host is None else batch.host.first(fresh.num_before),
            )
            self._over_pages(layer, query_TNH[:first], before, out[:first])
        attend_fresh(query_TNH[first:], key_TKH[first:], value_TKH[first:], fresh.lengths, out[first:])
        return out

    def over_pages(self, layer: int, query_TNH: Tensor) -> Tensor:
        """out_TNH of queries whose keys and values are in the pages already."""
        return self._over_pages(layer, query_TNH, self.batch, None)

    def _over_pages(self, layer: int, query_TNH: Tensor, batch: StepBatch, out: Tensor | None) -> Tensor:
        keys, values = self.pages(layer)
        window = self.cache.config.window(layer)
        if self._rows is not None:
            return attend_rows(query_TNH, keys, values, self._rows, window)
        if self._kernels is not None:
            step = self._step(batch)
            found = self._kernels.attend(query_TNH, keys, values, step, window=window, out=out)
            if found is not None:
                return found
        key_scales, value_scales = self._scales(layer)
        return paged_attention(
            query_TNH,
            keys,
            values,
            batch.block_tables_RP,
            batch.query_starts_R1,
            batch.context_R,
            max_query=batch.max_query,
            min_query=batch.min_query,
            max_context=batch.max_context,
            window=window,
            key_scales_PK=key_scales,
            value_scales_PK=value_scales,
            out=out,
            invariant=self.invariant,
            arrivals=self.cache.arrivals,
        )

    def _step(self, batch: StepBatch) -> PagedStep:
        """What other kernels are told of the batch, or of its first requests: made once for all layers."""
        step = self._steps.get(len(batch.context_R))
        if step is None:
            step = self._steps[len(batch.context_R)] = PagedStep(
                batch.block_tables_RP,
                batch.query_starts_R1,
                batch.context_R,
                batch.max_query,
                batch.max_context,
                batch.min_query,
                batch.host,
            )
        return step

    def _scales(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        if self.cache.key_scales is None or self.cache.value_scales is None:
            return None, None
        return self.cache.key_scales[layer], self.cache.value_scales[layer]

"""Stand-ins for FlashAttention-3 and FlashInfer: their signatures, by plain torch, and what their checks refuse.

The signatures are those of flash_attn_interface.py (flash_attn_3 3.0.0) and of flashinfer 0.7's wrappers.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.kernels.paged_attention import paged_attention_reference


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    starts: Tensor,
    context: Tensor,
    left: int,
    scale: float,
) -> Tensor:
    """What both libraries compute: causal, with `left` positions before the query's own, or all for -1."""
    window = None if left < 0 else left + 1
    return paged_attention_reference(query, keys, values, tables, starts, context, window=window, scale=scale)


class FakeFlashAttention3(ModuleType):
    """The module flash_attn_interface. `wrong` is added to every result, `error` raised in place of one."""

    def __init__(self) -> None:
        super().__init__("flash_attn_interface")
        self.__spec__ = ModuleSpec("flash_attn_interface", None)
        self.__version__ = "3.0.0"
        self.calls: list[dict[str, Any]] = []
        self.wrong, self.error = 0.0, None
        self.schedules: list[tuple[Tensor, tuple[Any, ...]]] = []

    def flash_attn_with_kvcache(
        self,
        q,
        k_cache,
        v_cache,
        k=None,
        v=None,
        qv=None,
        rotary_cos=None,
        rotary_sin=None,
        cache_seqlens=None,
        cache_batch_idx=None,
        cache_leftpad=None,
        page_table=None,
        cu_seqlens_q=None,
        cu_seqlens_k_new=None,
        max_seqlen_q=None,
        rotary_seqlens=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        rotary_interleaved=True,
        scheduler_metadata=None,
        num_splits=0,
        pack_gqa=None,
        sm_margin=0,
        return_softmax_lse=False,
    ):
        self.calls.append(dict(locals()))
        if self.error is not None:
            raise self.error
        assert k is None and v is None and qv is None and causal and window_size[1] in (-1, 0)
        for tensor in (page_table, cache_seqlens, *([] if cu_seqlens_q is None else [cu_seqlens_q])):
            assert tensor.dtype == torch.int32 and tensor.stride(-1) == 1
        assert cache_seqlens.is_contiguous()
        num_requests = len(cache_seqlens)
        assert page_table.shape[0] == num_requests
        assert int(cache_seqlens.max()) <= page_table.shape[1] * k_cache.shape[1]
        if scheduler_metadata is not None:
            heads = (q.shape[1], page_table.shape[1] * k_cache.shape[1], q.shape[2], *k_cache.shape[2:])
            asked = (num_requests, *heads, q.dtype, k_cache.shape[1], causal, window_size, num_splits, pack_gqa)
            assert [what for made, what in self.schedules if made is scheduler_metadata] == [asked]
        if cu_seqlens_q is None:
            assert q.dim() == 4 and q.shape[0] == num_requests
            starts = torch.arange(num_requests + 1, dtype=torch.int32) * q.shape[1]
        else:
            assert q.dim() == 3 and cu_seqlens_q.is_contiguous() and max_seqlen_q >= int(cu_seqlens_q.diff().max())
            starts = cu_seqlens_q
        flat = q.flatten(0, 1) if q.dim() == 4 else q
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        found = attend(flat, k_cache, v_cache, page_table, starts, cache_seqlens, window_size[0], scale) + self.wrong
        return found.view(q.shape)

    def get_scheduler_metadata(
        self,
        batch_size,
        max_seqlen_q,
        max_seqlen_k,
        num_heads_q,
        num_heads_kv,
        headdim,
        cache_seqlens,
        qkv_dtype=torch.bfloat16,
        headdim_v=None,
        cu_seqlens_q=None,
        cu_seqlens_k_new=None,
        cache_leftpad=None,
        page_size=None,
        max_seqlen_k_new=0,
        causal=False,
        window_size=(-1, -1),
        attention_chunk=0,
        has_softcap=False,
        num_splits=0,
        pack_gqa=None,
        sm_margin=0,
    ):
        assert len(cache_seqlens) == batch_size and cu_seqlens_q is None and not max_seqlen_k_new and not has_softcap
        heads = (max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim)
        asked = (batch_size, *heads, qkv_dtype, page_size, causal, window_size, num_splits, pack_gqa)
        self.schedules.append((torch.zeros(1, dtype=torch.int32), asked))
        return self.schedules[-1][0]


class _Wrapper:
    """What both wrappers do once they know the step."""

    def __init__(self, float_workspace_buffer: Tensor) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        self.planned: tuple[Any, ...] | None = None

    def keep(
        self, starts: Tensor, indptr: Tensor, indices: Tensor, last: Tensor, shape: tuple[int, ...], **more: Any
    ) -> None:
        """Host tensors only: others would be read back from the device."""
        for tensor in (starts, indptr, indices, last):
            assert tensor.dtype == torch.int32 and tensor.device.type == "cpu"
        size = shape[3]
        used = indptr.diff()
        assert len(indices) == indptr[-1] and int(last.min()) >= 1 and int(last.max()) <= size
        tables = torch.zeros(len(used), int(used.max()), dtype=torch.int32)
        for request, pages in enumerate(indices.split(used.tolist())):
            tables[request, : len(pages)] = pages
        self.planned = (tables, starts.clone(), ((used - 1) * size + last).int(), shape, more)

    def run(self, q, paged_kv_cache, *args, q_scale=None, k_scale=None, v_scale=None, out=None, lse=None):
        assert self.planned is not None and not args
        tables, starts, context, (heads, kv_heads, head_dim, size), more = self.planned
        keys, values = paged_kv_cache
        assert q.shape == (int(starts[-1]), heads, head_dim) and keys.shape[1:] == (size, kv_heads, head_dim)
        assert q.dtype == more["q_data_type"] and keys.dtype == more["kv_data_type"]
        found = attend(q, keys, values, tables, starts, context, more["window_left"], more["sm_scale"])
        return found if out is None else out.copy_(found)


class _Decode(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        use_tensor_cores=False,
        paged_kv_indptr_buffer=None,
        paged_kv_indices_buffer=None,
        paged_kv_last_page_len_buffer=None,
        backend="auto",
        jit_args=None,
    ) -> None:
        assert kv_layout == "NHD" and use_tensor_cores and not use_cuda_graph
        super().__init__(float_workspace_buffer)

    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        *,
        pos_encoding_mode="NONE",
        window_left=-1,
        logits_soft_cap=None,
        q_data_type="float16",
        kv_data_type=None,
        sm_scale=None,
        non_blocking=True,
    ) -> None:
        starts = torch.arange(len(last_page_len) + 1, dtype=torch.int32)
        more = {"window_left": window_left, "sm_scale": sm_scale}
        more |= {"q_data_type": q_data_type, "kv_data_type": kv_data_type}
        self.keep(starts, indptr, indices, last_page_len, (num_qo_heads, num_kv_heads, head_dim, page_size), **more)


class _Prefill(_Wrapper):
    def __init__(
        self,
        float_workspace_buffer,
        kv_layout="NHD",
        use_cuda_graph=False,
        qo_indptr_buf=None,
        paged_kv_indptr_buf=None,
        paged_kv_indices_buf=None,
        paged_kv_last_page_len_buf=None,
        custom_mask_buf=None,
        mask_indptr_buf=None,
        backend="auto",
        jit_args=None,
        jit_kwargs=None,
    ) -> None:
        assert kv_layout == "NHD" and not use_cuda_graph
        super().__init__(float_workspace_buffer)

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        head_dim_vo=None,
        custom_mask=None,
        packed_custom_mask=None,
        causal=False,
        pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False,
        sm_scale=None,
        window_left=-1,
        logits_soft_cap=None,
        rope_scale=None,
        rope_theta=None,
        q_data_type="float16",
        kv_data_type=None,
        o_data_type=None,
        non_blocking=True,
    ) -> None:
        assert causal
        more = {"window_left": window_left, "sm_scale": sm_scale}
        more |= {"q_data_type": q_data_type, "kv_data_type": kv_data_type}
        shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self.keep(qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, shape, **more)


class FakeFlashInfer(ModuleType):
    """The module flashinfer."""

    def __init__(self) -> None:
        super().__init__("flashinfer")
        self.__spec__ = ModuleSpec("flashinfer", None)
        self.__version__ = "0.7.2"
        self.BatchDecodeWithPagedKVCacheWrapper = _Decode
        self.BatchPrefillWithPagedKVCacheWrapper = _Prefill


def install(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> Any:
    """As if its package were installed."""
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module

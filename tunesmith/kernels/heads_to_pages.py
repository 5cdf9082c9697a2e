"""From a fused qkv projection to what attention over pages reads, in one pass, for models that only answer.

    qkv [T, N + 2K, H] -> (norm of every query and key head) -> rope -> query [T, N, H]
                                                                        key, value -> their slots of the pages

By itself each of these is a launch that moves a few kilobytes: in decoding the launches are what costs. Pages of fp8,
which have scales, are written by kernels/kv_cache.py instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.kernels.direct import direct
from tunesmith.kernels.kv_cache import write_kv_reference
from tunesmith.kernels.nf4 import use_kernel
from tunesmith.kernels.rms_norm import rms_norm_reference
from tunesmith.kernels.rope import rope_reference_


@dataclass(frozen=True)
class HeadsLayout:
    """How a fused qkv activation is cut: N query heads, K key heads, K value heads, each of H values.

    query_weight, key_weight: [H] of the norms of heads, with `eps`; None where heads are not normed.
    cos_TH2, sin_TH2: float32 [T, H/2]; None where positions are not rotated.
    invariant: a token's result does not depend on how many there are.
    keeps_keys: key heads are given back too, behind the query's.
    """

    num_heads: int
    num_kv_heads: int
    query_weight: Tensor | None = None
    key_weight: Tensor | None = None
    eps: float = 0.0
    cos_TH2: Tensor | None = None
    sin_TH2: Tensor | None = None
    invariant: bool = False
    keeps_keys: bool = False


def heads_to_pages(
    qkv_TF: Tensor, layout: HeadsLayout, keys_PSKH: Tensor, values_PSKH: Tensor, slots_T: Tensor
) -> Tensor:
    """query_TNH, ready for attention; keys and values are then in their slots. With `keeps_keys`, [T, N + K, H].

    Args: qkv_TF: contiguous. keys_PSKH, values_PSKH: contiguous pages of its dtype. slots_T: int64, page * S + offset;
    what has -1 is not written.
    """
    if use_kernel(qkv_TF.device):
        from tunesmith.kernels.heads_to_pages_triton import heads_to_pages_operator

        query_TNH: Tensor = direct(heads_to_pages_operator, qkv_TF)(
            qkv_TF,
            layout.num_heads,
            layout.num_kv_heads,
            layout.query_weight,
            layout.key_weight,
            layout.eps,
            layout.cos_TH2,
            layout.sin_TH2,
            keys_PSKH,
            values_PSKH,
            slots_T,
            layout.invariant,
            layout.keeps_keys,
        )
        return query_TNH
    return heads_to_pages_reference(qkv_TF, layout, keys_PSKH, values_PSKH, slots_T)


def heads_to_pages_reference(
    qkv_TF: Tensor, layout: HeadsLayout, keys_PSKH: Tensor, values_PSKH: Tensor, slots_T: Tensor
) -> Tensor:
    """heads_to_pages by the plain torch of the operations it joins: the truth that the kernel must equal."""
    sizes = (layout.num_heads, layout.num_kv_heads, layout.num_kv_heads)
    query, key, value = qkv_TF.view(qkv_TF.shape[0], sum(sizes), keys_PSKH.shape[-1]).split(sizes, dim=1)
    if layout.query_weight is not None and layout.key_weight is not None:
        query = rms_norm_reference(query, layout.query_weight, layout.eps)[0]
        key = rms_norm_reference(key, layout.key_weight, layout.eps)[0]
    else:
        query, key = query.contiguous(), key.contiguous()
    if layout.cos_TH2 is not None and layout.sin_TH2 is not None:
        rope_reference_(query, layout.cos_TH2, layout.sin_TH2)
        rope_reference_(key, layout.cos_TH2, layout.sin_TH2)
    write_kv_reference(key, value, keys_PSKH, values_PSKH, slots_T)
    return torch.cat([query, key], dim=1) if layout.keeps_keys else query

"""Between a fused qkv projection and the mixer: cut into heads, normed where the family does so, rotated.

    qkv [T, N + 2K, H] -> (norm of every query and key head) -> rope -> query, key; value is a view

Without norms the rotation is in place. With them the projection's own values are what the backward pass needs, and
query and key are new.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.kernels.rms_norm import rms_norm, rms_norm_backward
from tunesmith.kernels.rope import rope_

HalfRope = tuple[Tensor, Tensor]
"""cos and sin, float32 [T, H/2]."""
HeldHeads = tuple[Tensor | None, Tensor | None, Tensor | None]
"""The projection's own qkv_TF and the rstd of query [T, N] and key [T, K], where heads are normed."""


@dataclass
class Heads:
    """How a fused qkv activation is cut. eps: that of the norms of heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float = 0.0

    def view(self, qkv_TF: Tensor) -> Tensor:
        """[T, N + 2K, H]."""
        return qkv_TF.view(qkv_TF.shape[0], self.num_heads + 2 * self.num_kv_heads, self.head_dim)

    def rotated(self, qkv_TF: Tensor) -> Tensor:
        """The heads that positions rotate: [T, N + K, H]."""
        return self.view(qkv_TF)[:, : self.num_heads + self.num_kv_heads]

    def split(self, qkv_TF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """query_TNH, key_TKH, value_TKH as views."""
        sizes = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        query, key, value = self.view(qkv_TF).split(sizes, dim=1)
        return query, key, value

    def prepare(
        self, qkv_TF: Tensor, weights: tuple[Tensor | None, Tensor | None], rope: HalfRope | None
    ) -> tuple[Tensor, Tensor, Tensor, HeldHeads]:
        """query_TNH, key_TKH, value_TKH for the mixer, and what `backward` needs.

        Args: qkv_TF: written over where heads are not normed. weights: of the norms of query and key heads, or None.
        """
        query_weight, key_weight = weights
        if query_weight is None or key_weight is None:
            if rope is not None:
                rope_(self.rotated(qkv_TF), *rope)
            return *self.split(qkv_TF), (None, None, None)
        query, key, value = self.split(qkv_TF)
        query, query_rstd = rms_norm(query, query_weight, self.eps)
        key, key_rstd = rms_norm(key, key_weight, self.eps)
        if rope is not None:
            rope_(query, *rope)
            rope_(key, *rope)
        return query, key, value, (qkv_TF, query_rstd, key_rstd)

    def backward(
        self,
        grads: tuple[Tensor, Tensor, Tensor],
        weights: tuple[Tensor | None, Tensor | None],
        held: HeldHeads,
        rope: HalfRope | None,
        weight_grads: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gradients of qkv_TF and, where wanted, of the two weights, given those of query, key and value."""
        qkv, query_rstd, key_rstd = held
        if qkv is None or query_rstd is None or key_rstd is None:
            g = _joined(grads).flatten(1)
            if rope is not None:
                rope_(self.rotated(g), *rope, inverse=True)
            return g, None, None
        query_weight, key_weight = weights
        assert query_weight is not None and key_weight is not None
        query, key, _ = self.split(qkv)
        turned = torch.cat(grads[:2], dim=1)
        if rope is not None:
            rope_(turned, *rope, inverse=True)
        grad_query, grad_key = turned.split((self.num_heads, self.num_kv_heads), dim=1)
        dquery, dquery_weight = rms_norm_backward(grad_query, query, query_weight, query_rstd, None, weight_grads)
        dkey, dkey_weight = rms_norm_backward(grad_key, key, key_weight, key_rstd, None, weight_grads)
        return torch.cat((dquery, dkey, grads[2]), dim=1).flatten(1), dquery_weight, dkey_weight


def _joined(parts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """cat(parts, dim=1); the very memory, to be written over, where they are neighbours that fill their storage."""
    first, size = parts[0], parts[0].untyped_storage().nbytes()
    heads = sum(part.shape[1] for part in parts)
    shape = (first.shape[0], heads, first.shape[2])
    stride = (heads * first.shape[2], first.shape[2], 1)
    offset = 0
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.stride() != stride or part.storage_offset() != offset:
            return torch.cat(parts, dim=1)
        offset += part.shape[1] * first.shape[2]
    fills = size == shape[0] * stride[0] * first.element_size()
    return first.as_strided(shape, stride) if fills else torch.cat(parts, dim=1)

"""Causal attention of short documents of one length on a CPU, with the probabilities held for the backward pass.

    p_s = softmax(scale * q_s k[:e].T), out_s = p_s v[:e]     for every block of queries s ... e of a document
    dv += p_s.T g_s;  ds = p_s * (g_s v.T - rowsum(g_s * out_s));  dq_s = scale * ds k;  dk += scale * ds.T q_s

Torch's flash kernel for CPUs computes the probabilities again in the backward pass, by small products of its own; here
everything is batched products, and the query heads of one key head are one product's rows. What is held grows with the
length, so this is for short documents. Source: arXiv 1706.03762, section 3.2.1; the gradient is derived from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tunesmith.kernels import cpu_train
from tunesmith.kernels.in_float32 import in_float32_on_cpu

BLOCK = 64
"""Queries of a block: small ones compute less above the diagonal, large ones keep the products efficient."""
SHORTEST, LONGEST = 256, 512
"""Tokens of a document between which the probabilities are held. On one core, forward and backward: as fast as torch's
kernel at 128, up to 1.5 times at 256 and 1.3 to 1.9 times at 512; at 1,024 what is held is as large as a block's
activations. Not measured in each process, because then a clock would decide about a run's last bits."""


def fits_held(query_TNH: Tensor, key_TKH: Tensor, value_TKH: Tensor, length: int) -> bool:
    """Whether `attend_held` takes these documents of `length` tokens, and there is a backward pass to hold for."""
    tensors = (query_TNH, key_TKH, value_TKH)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return wanted and SHORTEST <= length <= LONGEST and in_float32_on_cpu(*tensors)


def fits_compiled(query_TNH: Tensor, key_TKH: Tensor, value_TKH: Tensor) -> bool:
    """Whether `attend_compiled` takes these heads."""
    return query_TNH.shape[-1] % 16 == 0 and cpu_train.takes(query_TNH, key_TKH, value_TKH)


def attend_compiled(query_TNH: Tensor, key_TKH: Tensor, value_TKH: Tensor, lengths: Sequence[int]) -> Tensor:
    """out_TNH of documents of any lengths, by our own C++ (kernels/cpu_attention.hpp); N a multiple of K.

    Checkpointing that goes by operators does not see it, and computes it twice: the same bits as without checkpointing.
    """
    return cast(Tensor, _Compiled.apply(query_TNH, key_TKH, value_TKH, tuple(lengths)))


class _Compiled(torch.autograd.Function):
    """The same sums; the probabilities are made again in the backward pass, from the logarithm of each row's sum."""

    @staticmethod
    def forward(ctx: Any, query_TNH: Tensor, key_TKH: Tensor, value_TKH: Tensor, lengths: tuple[int, ...]) -> Tensor:
        out, logs = query_TNH.new_empty(query_TNH.shape), query_TNH.new_empty(query_TNH.shape[:2])
        cpu_train.attend(logs, lengths, query_TNH, key_TKH, value_TKH, out)
        ctx.save_for_backward(query_TNH, key_TKH, value_TKH, out, logs)
        ctx.lengths = lengths
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        query, key, value, out, logs = ctx.saved_tensors
        parts = _joined_grads(query, key)
        g = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        cpu_train.attend(logs, ctx.lengths, query, key, value, out, g, *parts, is_backward=True)
        return *parts, None


def _joined_grads(query_TNH: Tensor, key_TKH: Tensor) -> tuple[Tensor, ...]:
    """Where gradients of query, key and value go: one buffer, the layout of a fused projection, so that whoever joins
    the three needs no copy."""
    heads = (query_TNH.shape[1], key_TKH.shape[1], key_TKH.shape[1])
    joined = query_TNH.new_empty(query_TNH.shape[0], sum(heads), query_TNH.shape[2])
    return joined.split(heads, dim=1)


def attend_held(query_TNH: Tensor, key_TKH: Tensor, value_TKH: Tensor, length: int) -> Tensor:
    """out_TNH of documents of `length` tokens each, T a multiple of it; N a multiple of K. float32."""
    return cast(Tensor, _Held.apply(query_TNH, key_TKH, value_TKH, length))


class _Held(torch.autograd.Function):
    """See the module. Below B are documents, C = B * K, G = N / K query heads of a key head, Q queries of a block."""

    @staticmethod
    def forward(ctx: Any, query_TNH: Tensor, key_TKH: Tensor, value_TKH: Tensor, length: int) -> Tensor:
        scale = query_TNH.shape[-1] ** -0.5
        query_BKGSH = _grouped(query_TNH, key_TKH.shape[1], length)
        key_CSH, value_CSH = _by_head(key_TKH, length), _by_head(value_TKH, length)
        out_TNH = query_TNH.new_empty(query_TNH.shape)
        out_BKGSH = _grouped(out_TNH, key_TKH.shape[1], length)
        held = []
        for start, end in _blocks(length):
            rows = _rows(query_BKGSH[:, :, :, start:end], scale)
            p = _probabilities(rows, key_CSH[:, :end], start)
            target = out_BKGSH[:, :, :, start:end]
            target.copy_(torch.bmm(p, value_CSH[:, :end]).view(target.shape))
            held += [rows, p]
        ctx.save_for_backward(out_TNH, key_CSH, value_CSH, *held)
        ctx.length, ctx.scale = length, scale
        return out_TNH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        out_TNH, key_CSH, value_CSH, *held = ctx.saved_tensors
        (g_TNH,), length = grads, ctx.length
        num_kv_heads = key_CSH.shape[0] * length // g_TNH.shape[0]
        dquery, dkey, dvalue = _joined_grads(g_TNH, g_TNH[:, :num_kv_heads])
        dquery_BKGSH = _grouped(dquery, num_kv_heads, length)
        g_BKGSH = _grouped(g_TNH, num_kv_heads, length)
        along_BKGS1 = _grouped(torch.linalg.vecdot(g_TNH, out_TNH)[..., None], num_kv_heads, length)
        dkey_CSH, dvalue_CSH = torch.zeros_like(key_CSH), torch.zeros_like(value_CSH)
        for (start, end), rows, p in zip(_blocks(length), held[::2], held[1::2], strict=True):
            g = _rows(g_BKGSH[:, :, :, start:end])
            dvalue_CSH[:, :end].baddbmm_(p.transpose(1, 2), g)
            ds = torch.bmm(g, value_CSH[:, :end].transpose(1, 2))
            ds.sub_(_rows(along_BKGS1[:, :, :, start:end])).mul_(p)
            target = dquery_BKGSH[:, :, :, start:end]
            torch.mul(torch.bmm(ds, key_CSH[:, :end]).view(target.shape), ctx.scale, out=target)
            dkey_CSH[:, :end].baddbmm_(ds.transpose(1, 2), rows)
        for d, d_CSH in ((dkey, dkey_CSH), (dvalue, dvalue_CSH)):
            by_document = d.unflatten(0, (-1, length)).transpose(1, 2)
            by_document.copy_(d_CSH.view(by_document.shape))
        return dquery, dkey, dvalue, None


def _probabilities(rows_CQH: Tensor, key_CEH: Tensor, start: int) -> Tensor:
    """softmax of the scores [C, G * Q, E]: the rows' queries are the positions start ... E, the scale is in them."""
    scores = torch.bmm(rows_CQH, key_CEH.transpose(1, 2))
    size = key_CEH.shape[1] - start
    above = torch.full((size, size), -torch.inf).triu_(1)
    scores.unflatten(1, (-1, size))[..., start:].add_(above)
    return torch.softmax(scores, -1, out=scores)


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _grouped(x_TNH: Tensor, num_kv_heads: int, length: int) -> Tensor:
    """A view [B, K, G, S, H]."""
    return x_TNH.unflatten(0, (-1, length)).unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _rows(x_BKGQH: Tensor, scale: float | None = None) -> Tensor:
    """[C, G * Q, H], contiguous and, where asked, scaled; never the same memory."""
    rows = torch.empty(x_BKGQH.shape, dtype=x_BKGQH.dtype)
    if scale is None:
        rows.copy_(x_BKGQH)
    else:
        torch.mul(x_BKGQH, scale, out=rows)
    return rows.flatten(2, 3).flatten(0, 1)


def _by_head(x_TKH: Tensor, length: int) -> Tensor:
    """[C, S, H], contiguous."""
    return x_TKH.unflatten(0, (-1, length)).transpose(1, 2).flatten(0, 1).contiguous()

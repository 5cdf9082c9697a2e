"""A block as four written-out functions: norm and projection, the mixer, projection and stream, and the whole MLP.

Between them nothing is held that is cheap to make again: of a norm, its input and one number a row; of the MLP, the
gate-up activation (or not even that: `again`), never the activation's output. The stream's gradient is added inside
the norm's backward pass. The sums are those of `decoder.Block`, whose eager form stays the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from tunesmith.kernels.rms_norm import rms_norm, rms_norm_again, rms_norm_backward
from tunesmith.kernels.rope import rope_
from tunesmith.kernels.swiglu_low_rank import swiglu_low_rank, swiglu_low_rank_backward
from tunesmith.model.layers import RMSNorm
from tunesmith.model.projection import Projection

HalfRope = tuple[Tensor, Tensor]
"""cos and sin, float32 [T, H/2]."""


@dataclass
class Heads:
    """How a fused qkv activation is cut."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

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


class NormQkv(torch.autograd.Function):
    """x -> query, key, value (rotated where rope is given), and x itself: its gradient comes back to the norm."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        norm_weight: Tensor,
        eps: float,
        projection: Projection,
        heads: Heads,
        rope: HalfRope | None,
        *trained: Tensor,
    ) -> tuple[Tensor, ...]:
        y, rstd = rms_norm(x_TD, norm_weight, eps)
        qkv, low = projection.forward(y)
        if rope is not None:
            rope_(heads.rotated(qkv), *rope)
        ctx.save_for_backward(x_TD, norm_weight, rstd, low, *(rope or (None, None)))
        ctx.projection, ctx.heads = projection, heads
        query, key, value = heads.split(qkv)
        return query, key, value, x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, norm_weight, rstd, low, cos, sin = ctx.saved_tensors
        *parts, grad_stream = grads
        g = torch.cat(parts, dim=1).flatten(1)
        if cos is not None:
            rope_(ctx.heads.rotated(g), cos, sin, inverse=True)
        dx, dnorm, dtrained = _through_norm(ctx, g, (x, norm_weight, rstd, low), grad_stream)
        return dx, dnorm, None, None, None, None, *dtrained


class AddProjection(torch.autograd.Function):
    """stream + projection(x)."""

    @staticmethod
    def forward(ctx: Any, stream_TD: Tensor, x_TF: Tensor, projection: Projection, *trained: Tensor) -> Tensor:
        y, low = projection.forward(x_TF, stream_TD)
        ctx.save_for_backward(x_TF if projection.needs_input else None, low)
        ctx.projection = projection
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, low = ctx.saved_tensors
        (g,) = grads
        dx, dlow = ctx.projection.input_grad(g) if ctx.needs_input_grad[1] else (None, None)
        return g, dx, None, *ctx.projection.parameter_grads(g, x, low, dlow)


class NormMlp(torch.autograd.Function):
    """x + down(silu(gate(norm(x))) * up(norm(x))).

    The adapters' products are added inside the activation's kernels. `again`: the gate-up activation is computed once
    more in the backward pass, not held. Its gradient is written over it, so a graph can be gone through once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        norm_weight: Tensor,
        eps: float,
        up: Projection,
        down: Projection,
        again: bool,
        *trained: Tensor,
    ) -> Tensor:
        y, rstd = rms_norm(x_TD, norm_weight, eps)
        gate_up, low_up = up.forward_apart(y)
        del y
        hidden = swiglu_low_rank(gate_up, low_up, up.wide(x_TD))
        out, low_down = down.forward(hidden, x_TD)
        ctx.save_for_backward(x_TD, norm_weight, rstd, low_up, low_down, None if again else gate_up)
        ctx.projection, ctx.down = up, down
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, norm_weight, rstd, low_up, low_down, gate_up = ctx.saved_tensors
        (g,) = grads
        y = None
        if gate_up is None:
            y = rms_norm_again(x, norm_weight, rstd)
            gate_up, _ = ctx.projection.forward_apart(y)
        down: Projection = ctx.down
        dhidden, dlow = down.input_grad_apart(g)
        wide, narrow = ctx.projection.wide(g), down.narrow(g)
        low = (None if wide is None else low_up, wide, None if narrow is None else dlow, narrow)
        dgate_up, hidden = swiglu_low_rank_backward(dhidden, gate_up, *low, down.needs_input, gate_up)
        del dhidden, gate_up
        ddown = down.parameter_grads(g, hidden, low_down, dlow)
        del hidden
        dx, dnorm, dup = _through_norm(ctx, dgate_up, (x, norm_weight, rstd, low_up), g, y)
        return dx, dnorm, None, None, None, None, *dup, *ddown


def _through_norm(
    ctx: Any,
    g: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor | None],
    grad_stream: Tensor,
    y: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """The gradients of the stream, the norm's weight and the projection's parameters, given that of its output."""
    x, norm_weight, rstd, low = saved
    projection: Projection = ctx.projection
    wants_stream, wants_norm = ctx.needs_input_grad[:2]
    if y is None and projection.needs_input:
        y = rms_norm_again(x, norm_weight, rstd)
    dy, dlow = projection.input_grad(g) if wants_stream or wants_norm else (None, None)
    dtrained = projection.parameter_grads(g, y, low, dlow)
    if dy is None:
        return None, None, dtrained
    dx, dnorm = rms_norm_backward(dy, x, norm_weight, rstd, grad_stream, wants_norm)
    return dx, None if dnorm is None else dnorm.to(norm_weight.dtype), dtrained


def norm_qkv(
    x_TD: Tensor, norm: RMSNorm, projection: Projection, heads: Heads, rope: HalfRope | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query_TNH, key_TKH, value_TKH and the stream, see `NormQkv`."""
    trained = projection.trained
    return cast(Any, NormQkv.apply(x_TD, norm.weight, norm.eps, projection, heads, rope, *trained))


def add_projection(stream_TD: Tensor, x_TF: Tensor, projection: Projection) -> Tensor:
    """stream + projection(x), see `AddProjection`."""
    return cast(Tensor, AddProjection.apply(stream_TD, x_TF, projection, *projection.trained))


def norm_mlp(x_TD: Tensor, norm: RMSNorm, up: Projection, down: Projection, again: bool) -> Tensor:
    """x + mlp(norm(x)), see `NormMlp`."""
    trained: Sequence[Tensor] = [*up.trained, *down.trained]
    return cast(Tensor, NormMlp.apply(x_TD, norm.weight, norm.eps, up, down, again, *trained))

"""A block as four written-out functions: norm and projection, the mixer, projection and stream, and the whole MLP.

Between them nothing is held that is cheap to make again: of a norm, its input and one number a row; of the MLP, the
gate-up activation (or not even that: `again`), never the activation's output; query, key and value by attention (or
made again too: `remade`). The stream's gradient is added inside the norm's backward pass. The sums are those of
`decoder.Block`, whose eager form stays the reference.

Where processes share the linears, x, the stream and their gradients are a process's own rows [P, D], and what lies
between a norm and a sum is of all tokens: a normed input is gathered again in the backward pass, not held.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from tunesmith.kernels.dropout import Noise
from tunesmith.kernels.rms_norm import rms_norm, rms_norm_again, rms_norm_backward
from tunesmith.kernels.swiglu_low_rank import swiglu_low_rank
from tunesmith.model.fused_parts import activation_grads, adapter_grads
from tunesmith.model.heads import HalfRope, Heads
from tunesmith.model.layers import RMSNorm
from tunesmith.model.projection import Projection
from tunesmith.model.remade import Made, RemadeHeads


class NormQkv(torch.autograd.Function):
    """x -> query, key, value (normed by heads and rotated where the family has it), and x itself: its gradient comes
    back to the norm."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        norm_weight: Tensor,
        query_weight: Tensor | None,
        key_weight: Tensor | None,
        eps: float,
        projection: Projection,
        heads: Heads,
        rope: HalfRope | None,
        noise: Noise | None,
        remade: RemadeHeads | None,
        *trained: Tensor,
    ) -> tuple[Tensor, ...]:
        y, rstd = rms_norm(x_TD, norm_weight, eps)
        qkv, low, free = projection.forward(projection.stream.gather(y), noise=noise)
        weights = (query_weight, key_weight)
        query, key, value, held = heads.prepare(qkv, weights, rope)
        if remade is not None:
            norm = (x_TD.detach(), norm_weight, rstd)
            remade.made_by(partial(_heads_again, norm, weights, projection, heads, rope, noise))
            held = (None, None, None)
        tables = rope or (None, None)
        ctx.save_for_backward(x_TD, norm_weight, rstd, low, free, *weights, *held, *tables)
        ctx.projection, ctx.heads, ctx.noise, ctx.remade = projection, heads, noise, remade
        return query, key, value, x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, norm_weight, rstd, low, free, query_weight, key_weight, *held, cos, sin = ctx.saved_tensors
        query, key, value, grad_stream = grads
        wants_weights = any(ctx.needs_input_grad[2:4])
        rope = None if cos is None else (cos, sin)
        weights = (query_weight, key_weight)
        known = tuple(held) if ctx.remade is None else ctx.remade.take()
        g, *dweights = ctx.heads.backward((query, key, value), weights, known, rope, wants_weights)
        del known
        dx, dnorm, dtrained = _through_norm(ctx, g, (x, norm_weight, rstd, low, free), grad_stream)
        dheads = [None if d is None else d.to(w.dtype) for d, w in zip(dweights, weights, strict=True)]
        return dx, dnorm, *dheads, None, None, None, None, None, None, *dtrained


def _heads_again(
    norm: tuple[Tensor, Tensor, Tensor],
    weights: tuple[Tensor | None, Tensor | None],
    projection: Projection,
    heads: Heads,
    rope: HalfRope | None,
    noise: Noise | None,
) -> Made:
    """What `NormQkv` made. norm: its input, its weight, and one number a row."""
    y = projection.stream.gather(rms_norm_again(*norm))
    return heads.prepare(projection.forward(y, noise=noise)[0], weights, rope)


class AddProjection(torch.autograd.Function):
    """stream + projection(x)."""

    @staticmethod
    def forward(
        ctx: Any, stream_TD: Tensor, x_TF: Tensor, projection: Projection, noise: Noise | None, *trained: Tensor
    ) -> Tensor:
        y, low, free = projection.forward_onto(x_TF, stream_TD, noise)
        ctx.save_for_backward(x_TF if projection.needs_input else None, low, free)
        ctx.projection, ctx.noise = projection, noise
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, low, free = ctx.saved_tensors
        (grad_stream,) = grads
        g = ctx.projection.stream.gather(grad_stream)
        dx, dlow = ctx.projection.input_grad(g, ctx.noise) if ctx.needs_input_grad[1] else (None, None)
        return grad_stream, dx, None, None, *ctx.projection.parameter_grads(g, x, (low, dlow, free), ctx.noise)


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
        noise: Noise | None,
        *trained: Tensor,
    ) -> Tensor:
        y, rstd = rms_norm(x_TD, norm_weight, eps)
        y = up.stream.gather(y)
        free_up, low_up = up.forward_apart(y, noise)
        del y
        hidden = swiglu_low_rank(up.output(free_up), *up.beside(low_up))
        out, low_down, free_down = down.forward_onto(hidden, x_TD, noise)
        ctx.save_for_backward(x_TD, norm_weight, rstd, low_up, low_down, free_down, None if again else free_up)
        ctx.projection, ctx.down, ctx.noise = up, down, noise
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, norm_weight, rstd, low_up, low_down, free_down, free_up = ctx.saved_tensors
        (grad_stream,), up, down = grads, ctx.projection, ctx.down
        g, y = down.stream.gather(grad_stream), None
        if free_up is None:
            y = up.stream.gather(rms_norm_again(x, norm_weight, rstd))
            free_up, _ = up.forward_apart(y, ctx.noise, low_up)
        dhidden, dlow = down.input_grad_apart(g, ctx.noise)
        gate_up = up.output(free_up)
        made = activation_grads(dhidden, gate_up, up.beside(low_up), down.beside_grad(dlow, ctx.noise), up, down)
        del dhidden, gate_up
        if made.of_narrow is None:
            ddown = down.parameter_grads(g, made.hidden, (low_down, dlow, free_down), ctx.noise)
        else:
            ddown = adapter_grads(down, g, None, low_down, dlow, (None, made.of_narrow))
        made.hidden = None
        held = (x, norm_weight, rstd, low_up, free_up)
        dx, dnorm, dup = _through_norm(ctx, made.gate_up, held, grad_stream, y, made.of_wide)
        return dx, dnorm, None, None, None, None, None, *dup, *ddown


def _through_norm(
    ctx: Any,
    g: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    grad_stream: Tensor,
    y: Tensor | None = None,
    of_up: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """The gradients of the stream, the norm's weight and the projection's parameters, given that of its output."""
    x, norm_weight, rstd, low, free = saved
    projection: Projection = ctx.projection
    wants_stream, wants_norm = ctx.needs_input_grad[:2]
    # Where processes share the projection, they talk beside its products.
    gathered = None
    if y is None and projection.needs_input:
        gathered = projection.stream.gather_beside(rms_norm_again(x, norm_weight, rstd))
    dy, dlow = projection.input_grad(g, ctx.noise) if wants_stream or wants_norm else (None, None)
    summed = None if dy is None else projection.stream.scatter_beside(dy)
    del dy
    y = y if gathered is None else gathered()
    if of_up is None or low is None or dlow is None:
        dtrained = projection.parameter_grads(g, y, (low, dlow, free), ctx.noise)
    else:
        dtrained = adapter_grads(projection, g, y, low, dlow, (of_up, None))
    if summed is None:
        return None, None, dtrained
    dx, dnorm = rms_norm_backward(summed(), x, norm_weight, rstd, grad_stream, wants_norm)
    return dx, None if dnorm is None else dnorm.to(norm_weight.dtype), dtrained


def norm_qkv(
    x_TD: Tensor,
    norm: RMSNorm,
    projection: Projection,
    heads: Heads,
    head_norms: tuple[RMSNorm, RMSNorm] | None = None,
    rope: HalfRope | None = None,
    noise: Noise | None = None,
    remade: RemadeHeads | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query_TNH, key_TKH, value_TKH and the stream, see `NormQkv`. head_norms: of queries and of keys. remade: is told
    how they are made again."""
    weights = (None, None) if head_norms is None else (head_norms[0].weight, head_norms[1].weight)
    arguments = (norm.eps, projection, heads, rope, noise, remade, *projection.trained)
    return cast(Any, NormQkv.apply(x_TD, norm.weight, *weights, *arguments))


def add_projection(stream_TD: Tensor, x_TF: Tensor, projection: Projection, noise: Noise | None = None) -> Tensor:
    """stream + projection(x), see `AddProjection`."""
    return cast(Tensor, AddProjection.apply(stream_TD, x_TF, projection, noise, *projection.trained))


def norm_mlp(
    x_TD: Tensor, norm: RMSNorm, up: Projection, down: Projection, again: bool, noise: Noise | None = None
) -> Tensor:
    """x + mlp(norm(x)), see `NormMlp`."""
    trained: Sequence[Tensor] = [*up.trained, *down.trained]
    return cast(Tensor, NormMlp.apply(x_TD, norm.weight, norm.eps, up, down, again, noise, *trained))

"""The written-out MLP over tiles of the tokens, so that the activation of a whole long sequence never exists.

An MLP treats every token by itself, so its output and its input's gradient are those of the tiles, one after the
other; the parameters' gradients are the tiles' sums. Each tile is `fused.NormMlp`, with the gate-up activation made
again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tunesmith.kernels.dropout import Noise
from tunesmith.model.fused import NormMlp
from tunesmith.model.layers import RMSNorm
from tunesmith.model.projection import Projection


class _TileContext:
    """What `NormMlp` finds in place of autograd's context."""

    def __init__(
        self, needs_input_grad: Sequence[bool], projections: Sequence[Projection], noise: Noise | None
    ) -> None:
        self.needs_input_grad = needs_input_grad
        self.noise = noise
        self.saved_tensors: tuple[Tensor | None, ...] = ()
        self.projection, self.down = projections

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Held by `TiledMlp`, joined with the other tiles'."""
        self.saved_tensors = tensors


class TiledMlp(torch.autograd.Function):
    """x + down(silu(gate(norm(x))) * up(norm(x))), tile by tile.

    A parameter's gradient is summed over the tiles in the parameter's dtype (adapters' masters are float32).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        norm_weight: Tensor,
        eps: float,
        up: Projection,
        down: Projection,
        tile_tokens: int,
        noise: Noise | None,
        *trained: Tensor,
    ) -> Tensor:
        out = torch.empty_like(x_TD)
        saved = []
        for rows in _tiles(x_TD.shape[0], tile_tokens):
            own = _noise_of(noise, rows)
            context = _TileContext(ctx.needs_input_grad, (up, down), own)
            out[rows].copy_(NormMlp.forward(context, x_TD[rows], norm_weight, eps, up, down, True, own, *trained))
            # The first two are the tile's input and the norm's weight, which are held whole.
            saved.append(context.saved_tensors[2:])
        ctx.save_for_backward(x_TD, norm_weight, *(_joined(column) for column in zip(*saved, strict=True)))
        ctx.projections, ctx.tile_tokens, ctx.noise = (up, down), tile_tokens, noise
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x_TD, norm_weight, *rest = ctx.saved_tensors
        dx = torch.empty_like(x_TD) if ctx.needs_input_grad[0] else None
        sums: list[Tensor | None] = []
        for rows in _tiles(x_TD.shape[0], ctx.tile_tokens):
            context = _TileContext(ctx.needs_input_grad, ctx.projections, _noise_of(ctx.noise, rows))
            parts = [None if column is None else column[_of_tile(column, rows, len(x_TD))] for column in rest]
            context.save_for_backward(x_TD[rows], norm_weight, *parts)
            dx_tile, *others = NormMlp.backward(context, grads[0][rows])
            if dx is not None:
                dx[rows].copy_(dx_tile)
            sums = _added(sums, others)
        return dx, *sums


def tiled_mlp(
    x_TD: Tensor, norm: RMSNorm, up: Projection, down: Projection, tile_tokens: int, noise: Noise | None = None
) -> Tensor:
    """x + mlp(norm(x)), see `TiledMlp`."""
    trained: Sequence[Tensor] = [*up.trained, *down.trained]
    return cast(Tensor, TiledMlp.apply(x_TD, norm.weight, norm.eps, up, down, tile_tokens, noise, *trained))


def _tiles(num_tokens: int, tile_tokens: int) -> Iterator[slice]:
    for start in range(0, num_tokens, tile_tokens):
        yield slice(start, min(start + tile_tokens, num_tokens))


def _of_tile(column: Tensor, rows: slice, num_tokens: int) -> slice:
    """The rows of what the tiles saved: as many times more than a tile's tokens as processes share the projections."""
    times = len(column) // num_tokens
    return slice(times * rows.start, times * rows.stop)


def _noise_of(noise: Noise | None, rows: slice) -> Noise | None:
    """The noise of a tile: masks do not depend on how tokens are cut."""
    return None if noise is None else noise.after(rows.start)


def _joined(tiles: Sequence[Tensor | None]) -> Tensor | None:
    """What every tile saved, along the tokens."""
    parts = [tile for tile in tiles if tile is not None]
    return torch.cat(parts) if parts else None


def _added(sums: list[Tensor | None], more: Sequence[Tensor | None]) -> list[Tensor | None]:
    """sums + more, in place; the first tile's gradients are where the sums are made."""
    if not sums:
        return list(more)
    for total, tensor in zip(sums, more, strict=True):
        if total is not None and tensor is not None:
            total.add_(tensor)
    return sums

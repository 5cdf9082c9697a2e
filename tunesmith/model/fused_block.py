"""A decoder's blocks in their written-out form, where every part has one; the eager part stands in where not."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from tunesmith.kernels.dropout import Noise
from tunesmith.kernels.rope import rope_tables_half
from tunesmith.model.attention import AttendLayer
from tunesmith.model.block import Block, Mlp
from tunesmith.model.dora_projection import DoraProjection
from tunesmith.model.entries import Entries
from tunesmith.model.fused import add_projection, norm_mlp, norm_qkv
from tunesmith.model.gathered import gathered
from tunesmith.model.heads import HalfRope, Heads
from tunesmith.model.layers import RMSNorm
from tunesmith.model.lora import AdaptedLinear
from tunesmith.model.low_rank import refresh
from tunesmith.model.projection import Projection
from tunesmith.model.projections import projection_of
from tunesmith.model.remade import RemadeHeads
from tunesmith.model.row_scale import RowScale, refresh_ratios
from tunesmith.model.tiled import tiled_mlp

_SITES = 4
"""Projections of a block."""


@dataclass
class FusedRope:
    """cos and sin of the packed positions: for the rotation in place, and for the eager parts."""

    half: HalfRope

    @classmethod
    def of(cls, inverse_H2: Tensor, positions_T: Tensor) -> FusedRope:
        """The tables of these positions, float32."""
        return cls(rope_tables_half(inverse_H2, positions_T))

    def eager(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each [T, 1, H] in `dtype`, as `layers.apply_rope` takes them."""
        cos, sin = (torch.cat((table, table), dim=-1)[:, None, :].to(dtype) for table in self.half)
        return cos, sin


@dataclass(frozen=True)
class Again:
    """What of a block is made again in the backward pass: the gate-up activation; query, key and value."""

    gate_up: bool = False
    qkv: bool = False


NOTHING = Again()


class FusedBlock:
    """One block's modules and the projections written out from them. Callable as the block is."""

    def __init__(self, block: Block, dtype: torch.dtype, layer: int = 0) -> None:
        self.block = block
        self.dtype = dtype
        self.layer = layer
        attention = block.attention
        self.linears = self._linears()
        self.masters = _masters(self.linears)
        self.head_norms = _head_norms(block)
        eps = 0.0 if self.head_norms is None else self.head_norms[0].eps
        self.heads = Heads(attention.num_heads, attention.num_kv_heads, attention.head_dim, eps)
        first = _SITES * layer
        has_heads = self.head_norms is not None or attention.q_norm is None
        writes_qkv = has_heads and _is_rms(block.attention_norm)
        self.qkv = projection_of(attention.qkv, dtype, first) if writes_qkv else None
        self.output = projection_of(attention.output, dtype, first + 1)
        self.up, self.down = _mlp_projections(block, dtype, first + 2)
        self.stream = block.stream
        for projection in self.projections:
            projection.stream = self.stream

    def is_current(self) -> bool:
        """Whether the block still has the modules that this was made from."""
        linears = self._linears()
        same = all(now is then for now, then in zip(linears, self.linears, strict=True))
        same = same and _head_norms(self.block) == self.head_norms
        return same and _masters(linears) == self.masters and self.block.stream is self.stream

    @property
    def projections(self) -> list[Projection]:
        """Those that are written out."""
        return [p for p in (self.qkv, self.output, self.up, self.down) if p is not None]

    @property
    def row_scales(self) -> list[RowScale]:
        """What DoRA multiplies rows by."""
        return [p.rows for p in self.projections if isinstance(p, DoraProjection)]

    @property
    def is_whole(self) -> bool:
        """Whether no part of the block is left to the eager form."""
        return len(self.projections) == 4

    def fixed(self, rope: FusedRope | None) -> list[Tensor]:
        """Tensors that outlive a backward pass, or that all blocks share."""
        return [*self.block.parameters(), *self.block.buffers(), *(() if rope is None else rope.half)]

    def __call__(
        self,
        x_TD: Tensor,
        rope: FusedRope | None,
        attend: AttendLayer,
        again: Again = NOTHING,
        tile_tokens: int | None = None,
        noise: Noise | None = None,
    ) -> Tensor:
        """The block's output.

        Args: again: what is made again in the backward pass. tile_tokens: the gate-up activation is, and the MLP
        goes through so many tokens at a time. noise: what the adapters' dropout is drawn from; None: none is dropped.
        """
        written = partial(self._run, rope=rope, attend=attend, again=again, tile_tokens=tile_tokens, noise=noise)
        return cast(Tensor, self.block(x_TD, rope, attend, written))

    def _run(
        self,
        x_TD: Tensor,
        rope: FusedRope | None,
        attend: AttendLayer,
        again: Again,
        tile_tokens: int | None,
        noise: Noise | None,
    ) -> Tensor:
        remade = RemadeHeads() if again.qkv else None
        query, key, value, stream = self._project(x_TD, rope, noise, remade)
        with nullcontext() if remade is None else remade.not_held(query, key, value):
            mixed = attend(query, key, value)
        del query, key, value
        mixed = mixed.flatten(1)
        stream = self._add_output(stream, mixed, noise)
        if self.up is None or self.down is None:
            return self.block.feed_forward(stream)
        norm = self.block.mlp_norm
        assert isinstance(norm, RMSNorm)
        if tile_tokens is not None:
            return tiled_mlp(stream, norm, self.up, self.down, tile_tokens, noise)
        return norm_mlp(stream, norm, self.up, self.down, again.gate_up, noise)

    def _project(
        self, x_TD: Tensor, rope: FusedRope | None, noise: Noise | None, remade: RemadeHeads | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        attention, norm = self.block.attention, self.block.attention_norm
        if self.qkv is None:
            y_TD = self.block.stream.gathered(norm(x_TD))
            query, key, value = attention.project(y_TD, None if rope is None else rope.eager(x_TD.dtype))
            return query, key, value, x_TD
        assert isinstance(norm, RMSNorm)
        tables = None if rope is None else rope.half
        return norm_qkv(x_TD, norm, self.qkv, self.heads, self.head_norms, tables, noise, remade)

    def _add_output(self, stream_TD: Tensor, mixed_TF: Tensor, noise: Noise | None) -> Tensor:
        if self.output is None:
            return stream_TD + self.block.stream.summed(self.block.attention.output(mixed_TF))
        return add_projection(stream_TD, mixed_TF, self.output, noise)

    def _linears(self) -> list[nn.Module]:
        attention, mlp = self.block.attention, self.block.mlp
        return [attention.qkv, attention.output, *([mlp.up, mlp.down] if isinstance(mlp, Mlp) else [])]


class FusedBlocks:
    """The written-out forms of all blocks of a decoder, made again when a method put other linears in place.

    blocks: as `of` found them last. It is another list when they were made again.
    """

    def __init__(self) -> None:
        self.blocks: list[FusedBlock] = []
        self.are_whole = True
        self._dtype: torch.dtype | None = None
        self._modules: nn.ModuleList | None = None
        self._entries = Entries([])
        self._parameters: list[nn.Parameter] = []
        self._masters: list[nn.Parameter] = []
        self._devices: list[torch.device] = []
        self._scales: list[tuple[Block, list[RowScale]]] = []
        self._drops = False

    def of(self, blocks: nn.ModuleList, dtype: torch.dtype) -> list[FusedBlock]:
        """The current forms of those that are here: a stage of a pipeline has some only.

        Asked before every forward pass, so that the modules are gone through only where an entry of one has changed.
        """
        if blocks is not self._modules or dtype != self._dtype or not self._is_as_noted():
            self._look(blocks, dtype)
        return self.blocks

    def trained(self) -> list[nn.Parameter]:
        """The blocks' trained parameters, as `of` found the blocks."""
        return [parameter for parameter in self._parameters if parameter.requires_grad]

    def refresh(self) -> None:
        """Bring the copies of the adapters up to date."""
        refresh([p.low_rank for p in self._projections() if p.low_rank is not None])
        refresh_ratios([rows for _, scales in self._scales for rows in scales])

    def measure(self) -> None:
        """Measure the rows' norms that DoRA divides by, as the adapters are now."""
        for block, scales in self._scales:
            with gathered(block):
                for rows in scales:
                    rows.measure()

    def draw(self, device: torch.device) -> Tensor | None:
        """A seed for the masks of one forward pass, int64 [1], from torch's generator; None where nothing is dropped.

        Drawn on the device, so that the host does not wait.
        """
        if not self._drops:
            return None
        return torch.randint(2**62, (1,), device=device)

    def _projections(self) -> list[Projection]:
        return [projection for block in self.blocks for projection in block.projections]

    def _is_as_noted(self) -> bool:
        """Whether modules hold what they held, adapters are where they were, and the blocks share the same stream."""
        if any(block.block.stream is not block.stream for block in self.blocks):
            return False
        return self._entries.are_same() and [master.device for master in self._masters] == self._devices

    def _look(self, blocks: nn.ModuleList, dtype: torch.dtype) -> None:
        """Make the forms again where one is not current, and note what they were made of."""
        here = [(layer, block) for layer, block in enumerate(blocks) if isinstance(block, Block)]
        known = [block.block for block in self.blocks]
        same = len(known) == len(here) and all(then is now for then, (_, now) in zip(known, here, strict=True))
        if not same or not all(b.dtype == dtype and b.is_current() for b in self.blocks):
            self.blocks = [_written(block, dtype, layer) for layer, block in here]
        self.are_whole = all(block.is_whole for block in self.blocks)
        self._scales = [(block.block, scales) for block in self.blocks if (scales := block.row_scales)]
        self._drops = any(projection.dropout for projection in self._projections())
        self._modules, self._dtype = blocks, dtype
        self._entries, self._parameters = Entries(blocks.modules()), list(blocks.parameters())
        adapted = [child for child in blocks.modules() if isinstance(child, AdaptedLinear)]
        self._masters = [parameter for linear in adapted for parameter in linear.adapters.parameters()]
        self._devices = [master.device for master in self._masters]


def _written(block: Block, dtype: torch.dtype, layer: int) -> FusedBlock:
    """DoRA's row norms are taken of the whole weight."""
    if not any(isinstance(child, AdaptedLinear) and child.is_dora for child in block.modules()):
        return FusedBlock(block, dtype, layer)
    with gathered(block):
        return FusedBlock(block, dtype, layer)


def _head_norms(block: Block) -> tuple[RMSNorm, RMSNorm] | None:
    query, key = block.attention.q_norm, block.attention.k_norm
    return (query, key) if type(query) is RMSNorm and type(key) is RMSNorm else None


def _masters(linears: list[nn.Module]) -> list[tuple[int, torch.device]]:
    """Which tensors the adapters are, and where."""
    adapted = [linear for linear in linears if isinstance(linear, AdaptedLinear)]
    return [(id(parameter), parameter.device) for linear in adapted for parameter in linear.adapters.parameters()]


def _mlp_projections(block: Block, dtype: torch.dtype, first_site: int) -> tuple[Projection | None, Projection | None]:
    mlp = block.mlp
    if not isinstance(mlp, Mlp) or not mlp.is_swiglu or not _is_rms(block.mlp_norm):
        return None, None
    up, down = projection_of(mlp.up, dtype, first_site), projection_of(mlp.down, dtype, first_site + 1)
    return (up, down) if up is not None and down is not None else (None, None)


def _is_rms(norm: nn.Module) -> bool:
    return type(norm) is RMSNorm

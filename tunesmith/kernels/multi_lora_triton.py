"""The Triton kernels of adapters of many requests, as one torch custom operator. Imported only where Triton is.

    shrink   low[c, t, p, r] = sum over chunk c of D of x[t] down[s]      float32, a part of D for each c
    expand   y[t, f] += sum over r of (sum over c of low[c, t, p, r]) up[s, f, r]

D is cut so that few tokens keep many processors busy. The parts are added in one order by whoever reads them, and no
atomic operation is used: a row's result depends neither on the other rows nor on the run.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current
from tunesmith.kernels.multi_lora_tiles import BAND, TILE
from tunesmith.kernels.quick import quick
from tunesmith.units import ceil_div

DEPTH = 128
"""Columns of x that one product takes; half as many in float32."""
_MOST_CHUNKS = 8
_DEPTHS_PER_CHUNK = 4
# The least of a dimension that a matrix unit takes.
_LEAST = 16
WARPS = 4


def depth_of(dtype: torch.dtype) -> int:
    """Columns of x that one product takes."""
    return DEPTH // 2 if dtype == torch.float32 else DEPTH


def num_chunks(width: int, depth: int, tile: int) -> int:
    """In how many parts D is summed: one where there are many tokens, which fill the device by themselves."""
    if tile != TILE:
        return 1
    return max(1, min(_MOST_CHUNKS, ceil_div(width, depth * _DEPTHS_PER_CHUNK)))


@torch.library.custom_op("tunesmith::multi_lora_", mutates_args=("y",))
def multi_lora_operator(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    ranks: Tensor,
    bands: Tensor,
    order: Tensor,
    tiles: Tensor,
    tile: int,
) -> None:
    """`multi_lora.add_multi_lora`; columns of x and y lie side by side."""
    if not x.numel():
        return
    rows, width, parts, rank = x.shape[0], x.shape[1], ranks.shape[1], up.shape[2]
    depth, padded = depth_of(x.dtype), max(_LEAST, triton.next_power_of_2(rank))
    chunks = num_chunks(width, depth, tile)
    low = torch.empty(chunks, rows, parts, rank, dtype=torch.float32, device=x.device)
    sizes = {"PARTS": parts, "RANK": rank, "PADDED": padded, "TILE": tile}
    with current(x.device):
        quick(_shrink_kernel)[(tiles.shape[0], parts, chunks)](
            x,
            down,
            low,
            ranks,
            order,
            tiles,
            rows,
            x.stride(0),
            WIDTH=width,
            DEPTH=depth,
            CHUNKS=chunks,
            num_warps=WARPS,
            enable_fp_fusion=False,
            **sizes,
        )
        quick(_expand_kernel)[(tiles.shape[0], bands.shape[0])](
            y,
            up,
            low,
            ranks,
            bands,
            order,
            tiles,
            rows,
            y.stride(0),
            up.shape[1],
            BAND=BAND,
            CHUNKS=chunks,
            num_warps=WARPS,
            enable_fp_fusion=False,
            **sizes,
        )


@multi_lora_operator.register_fake
def _multi_lora_fake(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    ranks: Tensor,
    bands: Tensor,
    order: Tensor,
    tiles: Tensor,
    tile: int,
) -> None:
    return None


@jit
def _tokens(order, tiles, TILE: tl.constexpr):
    """The adapter of a tile, its tokens' rows, and which of them there are."""
    tile = tl.program_id(0)
    slot = tl.load(tiles + tile * 3)
    first, stop = tl.load(tiles + tile * 3 + 1), tl.load(tiles + tile * 3 + 2)
    place = first + tl.arange(0, TILE)
    exists = place < stop
    return slot, tl.load(order + place, mask=exists, other=0).to(tl.int64), exists


@jit(do_not_specialize=["num_rows"])
def _shrink_kernel(
    x,
    down,
    low,
    ranks,
    order,
    tiles,
    num_rows,
    stride,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    part, chunk = tl.program_id(1), tl.program_id(2)
    slot = tl.load(tiles + tl.program_id(0) * 3)
    if slot >= 0:
        rank = tl.load(ranks + slot * PARTS + part)
        if rank > 0:
            slot, row, exists = _tokens(order, tiles, TILE)
            r = tl.arange(0, PADDED)
            total = tl.zeros((TILE, PADDED), tl.float32)
            span: tl.constexpr = (WIDTH + CHUNKS * DEPTH - 1) // (CHUNKS * DEPTH) * DEPTH
            matrix = down + (slot.to(tl.int64) * PARTS + part) * RANK * WIDTH
            for start in range(0, span, DEPTH):
                d = chunk * span + start + tl.arange(0, DEPTH)
                inside = (d < WIDTH)[None, :]
                left = tl.load(x + row[:, None] * stride + d[None, :], mask=exists[:, None] & inside, other=0.0)
                right = tl.load(matrix + r[:, None] * WIDTH + d[None, :], mask=(r < rank)[:, None] & inside, other=0.0)
                total = tl.dot(left, tl.trans(right), total, input_precision="ieee")
            at = low + ((chunk.to(tl.int64) * num_rows + row) * PARTS + part)[:, None] * RANK + r[None, :]
            tl.store(at, total, mask=exists[:, None] & (r < rank)[None, :])


@jit(do_not_specialize=["num_rows"])
def _expand_kernel(
    y,
    up,
    low,
    ranks,
    bands,
    order,
    tiles,
    num_rows,
    stride,
    num_columns,
    BAND: tl.constexpr,
    CHUNKS: tl.constexpr,
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
):
    slot = tl.load(tiles + tl.program_id(0) * 3)
    if slot >= 0:
        part = tl.load(bands + tl.program_id(1) * 3)
        rank = tl.load(ranks + slot * PARTS + part)
        if rank > 0:
            slot, row, exists = _tokens(order, tiles, TILE)
            column = tl.load(bands + tl.program_id(1) * 3 + 1) + tl.arange(0, BAND)
            is_column = column < tl.load(bands + tl.program_id(1) * 3 + 2)
            r = tl.arange(0, PADDED)
            is_low = exists[:, None] & (r < rank)[None, :]
            at = low + (row * PARTS + part)[:, None] * RANK + r[None, :]
            left = tl.zeros((TILE, PADDED), tl.float32)
            for chunk in tl.static_range(CHUNKS):
                left += tl.load(at + tl.cast(num_rows, tl.int64) * (chunk * PARTS * RANK), mask=is_low, other=0.0)
            matrix = up + slot.to(tl.int64) * num_columns * RANK
            right = tl.load(
                matrix + column[:, None] * RANK + r[None, :], mask=is_column[:, None] & (r < rank)[None, :], other=0.0
            )
            product = tl.dot(left.to(right.dtype), tl.trans(right), input_precision="ieee")
            target = y + row[:, None] * stride + column[None, :]
            is_target = exists[:, None] & is_column[None, :]
            held = tl.load(target, mask=is_target, other=0.0)
            tl.store(target, (held.to(tl.float32) + product).to(y.dtype.element_ty), mask=is_target)

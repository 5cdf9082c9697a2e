"""The Triton kernel that takes NF4 codes to fp8 codes, as a torch custom operator. Imported only where Triton is
installed.

A program reads a tile of codes and the scales of its blocks, and writes the tile as it is or transposed.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.codebooks import dynamic_values, nf4_values
from tunesmith.kernels.fp8_weight import FP8
from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current
from tunesmith.kernels.nf4_weight import BLOCK, SCALE_BLOCK, NF4Weight
from tunesmith.units import ceil_div

# Tile of one program: rows, and blocks of 64 weights in each.
ROWS = 64
BLOCKS = 2


def nf4_to_fp8_codes(parts: Sequence[NF4Weight], scale_F: Tensor, transposed: bool) -> Tensor:
    """fp8 codes [F, D], or [D, F] transposed, of weights whose rows are whole blocks: one operator, a launch each."""
    empty = scale_F.new_empty(0)
    return nf4_to_fp8_operator(
        [part.codes for part in parts],
        [part.scales for part in parts],
        [empty if part.scale_scales is None else part.scale_scales for part in parts],
        [empty if part.offset is None else part.offset for part in parts],
        scale_F,
        [part.shape[0] for part in parts],
        parts[0].shape[1],
        transposed,
    )


@torch.library.custom_op("tunesmith::nf4_to_fp8", mutates_args=())
def nf4_to_fp8_operator(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    scale_scales: Sequence[Tensor],
    offsets: Sequence[Tensor],
    row_scales: Tensor,
    rows: Sequence[int],
    columns: int,
    transposed: bool,
) -> Tensor:
    """fp8 codes by row scales (float32 [sum(rows)]). Empty `scale_scales`: plain scales."""
    num_rows = sum(rows)
    out = _nf4_to_fp8_fake(codes, scales, scale_scales, offsets, row_scales, rows, columns, transposed)
    table, dynamic = nf4_values(out.device), dynamic_values(out.device)
    first = 0
    with current(out.device):
        for part, part_rows in enumerate(rows):
            _nf4_to_fp8_kernel[(ceil_div(columns, BLOCKS * BLOCK), ceil_div(part_rows, ROWS))](
                codes[part],
                scales[part],
                scale_scales[part],
                offsets[part],
                table,
                dynamic,
                row_scales,
                out,
                first,
                part_rows,
                columns,
                num_rows if transposed else columns,
                DOUBLE=scale_scales[part].numel() > 0,
                TRANSPOSED=transposed,
                BLOCK=BLOCK,
                SCALE_BLOCK=SCALE_BLOCK,
                ROWS=ROWS,
                BLOCKS=BLOCKS,
                enable_fp_fusion=False,  # a scale is rounded twice, after the product and after the sum
            )
            first += part_rows
    return out


@nf4_to_fp8_operator.register_fake
def _nf4_to_fp8_fake(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    scale_scales: Sequence[Tensor],
    offsets: Sequence[Tensor],
    row_scales: Tensor,
    rows: Sequence[int],
    columns: int,
    transposed: bool,
) -> Tensor:
    shape = (columns, sum(rows)) if transposed else (sum(rows), columns)
    return torch.empty(shape, dtype=FP8, device=codes[0].device)


@jit
def _nf4_to_fp8_kernel(
    codes,
    scales,
    scale_scales,
    offset,
    table,
    dynamic,
    row_scales,
    out,
    first_row,
    num_rows,
    width,
    out_stride,
    DOUBLE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    COLUMNS: tl.constexpr = BLOCKS * BLOCK
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    in_rows = row < num_rows
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    in_range = in_rows[:, None] & (block[None, :] * BLOCK < width)
    # A block's index in the weight: rows are whole blocks.
    index = row[:, None].to(tl.int64) * (width // BLOCK) + block[None, :]
    scale = tl.load(scales + index, mask=in_range, other=0)
    if DOUBLE:
        inner = tl.load(scale_scales + index // SCALE_BLOCK, mask=in_range, other=0.0)
        scale = tl.load(dynamic + scale.to(tl.int32)) * inner + tl.load(offset)
    byte = index[:, :, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, None, :]
    packed = tl.load(codes + byte, mask=in_range[:, :, None], other=0).to(tl.int32)
    high = tl.load(table + (packed >> 4)) * scale[:, :, None]
    low = tl.load(table + (packed & 15)) * scale[:, :, None]
    values = tl.reshape(tl.join(high, low), [ROWS, COLUMNS])
    row_scale = tl.load(row_scales + first_row + row, mask=in_rows, other=1.0)
    code = (values * tl.div_rn(1.0, row_scale)[:, None]).to(tl.float8e4nv)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    out_row = first_row + row
    if TRANSPOSED:
        target = column[:, None].to(tl.int64) * out_stride + out_row[None, :]
        tl.store(out + target, tl.trans(code), mask=(column[:, None] < width) & in_rows[None, :])
    else:
        target = out_row[:, None].to(tl.int64) * out_stride + column[None, :]
        tl.store(out + target, code, mask=in_rows[:, None] & (column[None, :] < width))

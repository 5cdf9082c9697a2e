"""The kernel of column_dot, as a torch custom operator. Imported only where Triton is installed."""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current, in_rows
from tunesmith.units import ceil_div

# One program sums so many rows of so many columns, a tile at a time.
_COLUMNS = 256
_TILE_ROWS = 16
_ROWS = 512


@torch.library.custom_op("tunesmith::column_dot", mutates_args=())
def column_dot_operator(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of the columns, float32 [F]. Every program sums its rows; torch adds the programs' sums."""
    rows, width = left.shape
    left, right = in_rows(left), in_rows(right)
    partial = left.new_zeros((ceil_div(rows, _ROWS), width), dtype=torch.float32)
    if rows and width:
        with current(left.device):
            _column_dot_kernel[(ceil_div(width, _COLUMNS), partial.shape[0])](
                left,
                right,
                partial,
                rows,
                left.stride(0),
                right.stride(0),
                WIDTH=width,
                COLUMNS=_COLUMNS,
                TILE_ROWS=_TILE_ROWS,
                ROWS=_ROWS,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return partial.sum(0)


@column_dot_operator.register_fake
def _column_dot_fake(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[1], dtype=torch.float32)


@jit(do_not_specialize=["num_rows"])
def _column_dot_kernel(
    left,
    right,
    partial,
    num_rows,
    left_stride,
    right_stride,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * ROWS
    total = tl.zeros([TILE_ROWS, COLUMNS], tl.float32)
    for start in range(0, ROWS, TILE_ROWS):
        row = first + start + tl.arange(0, TILE_ROWS)
        mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
        at = row.to(tl.int64)[:, None]
        a = tl.load(left + at * left_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(right + at * right_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        total += a * b
    out = partial + tl.program_id(1).to(tl.int64) * WIDTH + column
    tl.store(out, tl.sum(total, axis=0), mask=column < WIDTH)

"""The Triton kernels of `fp8_columns`, as a torch custom operator. Imported only where Triton is installed.

Two launches, each a trip through x: the largest of every column, then the codes, turned tile by tile. The largest are
compared as integers: the bits of floats that are not negative have the same order, and those of NaN are above all.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.fp8_weight import FP8, LARGEST, SMALLEST_SCALE, padded
from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current
from tunesmith.units import ceil_div

# Tiles of one program: the first reads along columns, the second writes along tokens.
LARGEST_TILE = (64, 128)
CODES_TILE = (128, 64)
_WARPS = 4


@torch.library.custom_op("tunesmith::fp8_quantize_columns", mutates_args=())
def quantize_columns_operator(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [D, T padded] and scales float32 [D, 1] of the transpose of x [T, D]."""
    x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    num_rows, width = x.shape
    num_padded = padded(num_rows)
    codes = torch.empty(width, num_padded, dtype=FP8, device=x.device)
    scale = torch.empty(width, 1, device=x.device)
    largest = torch.zeros(width, dtype=torch.int32, device=x.device)
    if width == 0:
        return codes, scale
    with current(x.device):
        if num_rows:
            rows, columns = LARGEST_TILE
            _largest_kernel[(ceil_div(width, columns), ceil_div(num_rows, rows))](
                x,
                largest,
                x.stride(0),
                num_rows,
                width,
                ROWS=rows,
                COLUMNS=columns,
                num_warps=_WARPS,
                enable_fp_fusion=False,
            )
        rows, columns = CODES_TILE
        _codes_kernel[(ceil_div(width, columns), ceil_div(num_padded, rows))](
            x,
            largest,
            codes,
            scale,
            x.stride(0),
            num_rows,
            num_padded,
            width,
            ROWS=rows,
            COLUMNS=columns,
            INVERSE_LARGEST=1 / LARGEST,
            SMALLEST=SMALLEST_SCALE,
            num_warps=_WARPS,
            enable_fp_fusion=False,  # nothing is multiplied and added
        )
    return codes, scale


@quantize_columns_operator.register_fake
def _quantize_columns_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape[1], padded(x.shape[0]), dtype=FP8, device=x.device)
    return codes, torch.empty(x.shape[1], 1, dtype=torch.float32, device=x.device)


@jit
def _largest_kernel(x, largest, stride, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> None:
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    mask = (row[:, None] < num_rows) & (column[None, :] < width)
    value = tl.load(x + row[:, None].to(tl.int64) * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    bits = tl.abs(value).to(tl.int32, bitcast=True)
    tl.atomic_max(largest + column, tl.max(bits, axis=0), mask=column < width, sem="relaxed")


@jit
def _codes_kernel(
    x,
    largest,
    codes,
    scales,
    stride,
    num_rows,
    num_padded,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INVERSE_LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
) -> None:
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    in_width = column < width
    top = tl.load(largest + column, mask=in_width, other=0).to(tl.float32, bitcast=True)
    scale = top * INVERSE_LARGEST
    # Written so that NaN stays NaN.
    scale = tl.where(scale < SMALLEST, SMALLEST, scale)
    if tl.program_id(1) == 0:
        tl.store(scales + column, scale, mask=in_width)
    mask = (row[:, None] < num_rows) & in_width[None, :]
    value = tl.load(x + row[:, None].to(tl.int64) * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    code = (value * tl.div_rn(1.0, scale)[None, :]).to(tl.float8e4nv)
    target = column[:, None].to(tl.int64) * num_padded + row[None, :]
    tl.store(codes + target, tl.trans(code), mask=in_width[:, None] & (row[None, :] < num_padded))

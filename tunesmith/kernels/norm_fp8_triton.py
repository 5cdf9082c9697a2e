"""The Triton kernel of RMSNorm with fp8 codes, as a torch custom operator. Imported only where Triton is installed."""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.fp8 import FP8, LARGEST, SMALLEST_SCALE
from tunesmith.kernels.fp8_triton import code_of, scale_of
from tunesmith.kernels.launch import current, in_rows, tile
from tunesmith.units import ceil_div


@torch.library.custom_op("tunesmith::rms_norm_fp8", mutates_args=())
def rms_norm_fp8_operator(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, rstd, codes and scales of x [T, D]; a row is read once and never leaves its program in between."""
    num_rows, width = x.shape
    y, rstd, codes, scale = _empty(x)
    source = in_rows(x)
    tile_rows, columns, warps = tile(width)
    if x.numel() == 0:
        return y, rstd, codes, scale.fill_(SMALLEST_SCALE)
    with current(x.device):
        _kernel[(ceil_div(num_rows, tile_rows),)](
            source,
            weight.contiguous(),
            y,
            rstd,
            codes,
            scale,
            num_rows,
            source.stride(0),
            eps,
            WIDTH=width,
            ROWS=tile_rows,
            COLUMNS=columns,
            INVERSE_LARGEST=1 / LARGEST,
            SMALLEST=SMALLEST_SCALE,
            num_warps=warps,
            enable_fp_fusion=False,  # rounds as plain torch does
        )
    return y, rstd, codes, scale


@rms_norm_fp8_operator.register_fake
def _rms_norm_fp8_fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty(x)


def _empty(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rstd = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), rstd, x.new_empty(x.shape, dtype=FP8), rstd.new_empty(x.shape[0], 1)


@triton.jit(do_not_specialize=["num_rows"])
def _kernel(
    x,
    weight,
    y,
    rstd,
    codes,
    scales,
    num_rows,
    stride,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INVERSE_LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    in_width = column < WIDTH
    mask = (row < num_rows)[:, None] & in_width
    wide = tl.load(x + row.to(tl.int64)[:, None] * stride + column, mask=mask, other=0.0).to(tl.float32)
    root = tl.math.rsqrt(tl.sum(wide * wide, axis=1) / WIDTH + eps)
    tl.store(rstd + row, root, mask=row < num_rows)
    dtype = y.dtype.element_ty
    scaled = (wide * root[:, None]).to(dtype).to(tl.float32)
    factor = tl.load(weight + column, mask=in_width, other=0.0).to(dtype).to(tl.float32)
    result = (scaled * factor).to(dtype)
    at = row.to(tl.int64)[:, None] * WIDTH + column
    tl.store(y + at, result, mask=mask)
    # What is quantised is the rounded result.
    value = result.to(tl.float32)
    scale = scale_of(tl.max(tl.abs(value), axis=1), INVERSE_LARGEST, SMALLEST)
    tl.store(scales + row, scale, mask=row < num_rows)
    tl.store(codes + at, code_of(value, scale[:, None]), mask=mask)

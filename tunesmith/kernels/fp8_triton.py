"""The Triton kernels of fp8, as torch custom operators. Imported only where Triton is installed.

`quantize_rows` is limited by memory: a row is read once where it fits into the registers of one program (wide ones by
the kernel of `fp8_held_triton`), and a second time where it does not.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.fp8_held_triton import code_of, held, launch_held, scale_of
from tunesmith.kernels.fp8_weight import FP8, LARGEST, SMALLEST_SCALE
from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current
from tunesmith.kernels.quick import quick
from tunesmith.units import ceil_div

# Columns that one program holds at once.
WIDEST = 8192
_COLUMNS_PER_WARP = 1024
TILE = 128


@torch.library.custom_op("tunesmith::fp8_quantize_rows", mutates_args=())
def quantize_rows_operator(x: Tensor, fold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes [T, D] and scales float32 [T, 1] of x [T, D], its columns multiplied by `fold` (float32 [D]) before."""
    x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    fold = None if fold is None else fold.contiguous()
    num_rows, width = x.shape
    codes = torch.empty(num_rows, width, dtype=FP8, device=x.device)
    scale = torch.empty(num_rows, 1, device=x.device)
    if codes.numel() == 0:
        return codes, scale.fill_(SMALLEST_SCALE)
    columns = min(WIDEST, triton.next_power_of_2(width))
    form = None if columns >= width else held(width * x.element_size())
    with current(x.device):
        if form is None:
            launch_by_columns(x, fold, codes, scale, columns, max(1, min(8, columns // _COLUMNS_PER_WARP)))
        else:
            launch_held(x, fold, codes, scale, form)
    return codes, scale


def launch_by_columns(x: Tensor, fold: Tensor | None, codes: Tensor, scale: Tensor, columns: int, warps: int) -> None:
    """Codes and scales of the rows of x, so many columns (a power of two) at a time: wider rows are read twice."""
    num_rows, width = x.shape
    quick(_quantize_rows_kernel)[(num_rows,)](
        x,
        x if fold is None else fold,
        codes,
        scale,
        x.stride(0),
        width,
        FOLD=fold is not None,
        WHOLE=columns >= width,
        COLUMNS=columns,
        INVERSE_LARGEST=1 / LARGEST,
        SMALLEST=SMALLEST_SCALE,
        num_warps=warps,
        enable_fp_fusion=False,  # nothing is multiplied and added
    )


@quantize_rows_operator.register_fake
def _quantize_rows_fake(x: Tensor, fold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=FP8, device=x.device)
    return codes, torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)


@torch.library.custom_op("tunesmith::fp8_transpose", mutates_args=())
def transpose_operator(codes: Tensor) -> Tensor:
    """The transpose of contiguous codes [F, D], contiguous."""
    num_rows, width = codes.shape
    out = torch.empty(width, num_rows, dtype=codes.dtype, device=codes.device)
    grid = (ceil_div(width, TILE), ceil_div(num_rows, TILE))
    if codes.numel():
        with current(codes.device):
            _transpose_kernel[grid](
                codes.view(torch.uint8),
                out.view(torch.uint8),
                num_rows,
                width,
                codes.stride(0),
                TILE=TILE,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return out


@transpose_operator.register_fake
def _transpose_fake(codes: Tensor) -> Tensor:
    return codes.new_empty(codes.shape[1], codes.shape[0])


@jit
def _load_columns(x, fold, column, width, FOLD: tl.constexpr):
    value = tl.load(x + column, mask=column < width, other=0.0).to(tl.float32)
    if FOLD:
        value *= tl.load(fold + column, mask=column < width, other=0.0)
    return value


@jit
def _store_codes(codes, column, width, value, scale):
    tl.store(codes + column, code_of(value, scale), mask=column < width)


@jit
def _quantize_rows_kernel(
    x,
    fold,
    codes,
    scales,
    stride,
    width,
    FOLD: tl.constexpr,
    WHOLE: tl.constexpr,
    COLUMNS: tl.constexpr,
    INVERSE_LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    x += row * stride
    codes += row * width
    lane = tl.arange(0, COLUMNS)
    if WHOLE:
        value = _load_columns(x, fold, lane, width, FOLD)
        scale = scale_of(tl.max(tl.abs(value), axis=0), INVERSE_LARGEST, SMALLEST)
        _store_codes(codes, lane, width, value, scale)
    else:
        largest = tl.zeros([COLUMNS], tl.float32)
        for start in range(0, width, COLUMNS):
            value = _load_columns(x, fold, start + lane, width, FOLD)
            largest = tl.maximum(largest, tl.abs(value))
        scale = scale_of(tl.max(largest, axis=0), INVERSE_LARGEST, SMALLEST)
        for start in range(0, width, COLUMNS):
            value = _load_columns(x, fold, start + lane, width, FOLD)
            _store_codes(codes, start + lane, width, value, scale)
    tl.store(scales + row, scale)


@jit
def _transpose_kernel(codes, out, num_rows, width, stride, TILE: tl.constexpr) -> None:
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    source = row[:, None].to(tl.int64) * stride + column[None, :]
    tile = tl.load(codes + source, mask=(row[:, None] < num_rows) & (column[None, :] < width), other=0)
    target = column[:, None].to(tl.int64) * num_rows + row[None, :]
    tl.store(out + target, tl.trans(tile), mask=(column[:, None] < width) & (row[None, :] < num_rows))

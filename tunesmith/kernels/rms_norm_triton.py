"""RMSNorm's Triton kernels, as torch custom operators. Imported only where Triton is installed."""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.launch import current, in_rows, num_processors, row_strides, tile
from tunesmith.units import ceil_div

# Programs for each multiprocessor where the weight's gradient is summed: each holds one float32 row of it.
_PROGRAMS_PER_PROCESSOR = 2


@torch.library.custom_op("tunesmith::rms_norm", mutates_args=())
def rms_norm_operator(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y (contiguous, x's dtype) and rstd (float32) of every row."""
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return _normalise(x, weight, rstd, eps, again=False), rstd


@rms_norm_operator.register_fake
def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("tunesmith::rms_norm_again", mutates_args=())
def rms_norm_again_operator(x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """y from the rstd that rms_norm returned."""
    return _normalise(x, weight, rstd.contiguous(), 0.0, again=True)


@rms_norm_again_operator.register_fake
def _rms_norm_again_fake(x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _normalise(x: Tensor, weight: Tensor, rstd: Tensor, eps: float, again: bool) -> Tensor:
    y = x.new_empty(x.shape)
    num_rows, source = rstd.numel(), in_rows(x)
    tile_rows, columns, warps = tile(x.shape[-1])
    if num_rows:
        with current(x.device):
            _normalise_kernel[(ceil_div(num_rows, tile_rows),)](
                source,
                weight.contiguous(),
                rstd,
                y,
                num_rows,
                *row_strides(source),
                eps,
                INNER=source.shape[1] if source.dim() == 3 else 1,
                WIDTH=x.shape[-1],
                ROWS=tile_rows,
                COLUMNS=columns,
                AGAIN=again,
                num_warps=warps,
                enable_fp_fusion=False,  # rounds as plain torch does
            )
    return y


@triton.jit
def _row_offset(row, outer_stride, inner_stride, INNER: tl.constexpr):
    # Row r of [T, INNER, D] begins at (r // INNER) * outer + (r % INNER) * inner; of [T, D] at r * outer.
    if INNER == 1:
        offset = row.to(tl.int64) * outer_stride
    else:
        offset = (row // INNER).to(tl.int64) * outer_stride + (row % INNER).to(tl.int64) * inner_stride
    return offset


@triton.jit(do_not_specialize=["num_rows"])
def _normalise_kernel(
    x,
    weight,
    rstd,
    y,
    num_rows,
    x_outer,
    x_inner,
    eps,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AGAIN: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    in_width = column < WIDTH
    mask = (row < num_rows)[:, None] & in_width
    offset = _row_offset(row, x_outer, x_inner, INNER)
    wide = tl.load(x + offset[:, None] + column, mask=mask, other=0.0).to(tl.float32)
    if AGAIN:
        scale = tl.load(rstd + row, mask=row < num_rows, other=0.0)
    else:
        scale = tl.math.rsqrt(tl.sum(wide * wide, axis=1) / WIDTH + eps)
        tl.store(rstd + row, scale, mask=row < num_rows)
    dtype = y.dtype.element_ty
    scaled = (wide * scale[:, None]).to(dtype).to(tl.float32)
    factor = tl.load(weight + column, mask=in_width, other=0.0).to(dtype).to(tl.float32)
    tl.store(y + row.to(tl.int64)[:, None] * WIDTH + column, (scaled * factor).to(dtype), mask=mask)


@torch.library.custom_op("tunesmith::rms_norm_backward", mutates_args=())
def rms_norm_backward_operator(
    grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, add: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """grad_x (contiguous) and grad_weight (float32; without `weight_grad` empty).

    Every program sums the weight's gradient over its own rows; those sums are added up by torch. No atomics: the order
    depends on the number of the chip's multiprocessors alone.
    """
    width, num_rows = x.shape[-1], rstd.numel()
    grad_x = x.new_empty(x.shape)
    tile_rows, columns, warps = tile(width)
    tiles = ceil_div(num_rows, tile_rows)
    programs = min(tiles, _PROGRAMS_PER_PROCESSOR * num_processors(x.device)) if weight_grad else tiles
    partial = x.new_empty((programs if weight_grad else 0, width), dtype=torch.float32)
    grad_y, source = in_rows(grad_y), in_rows(x)
    added = source if add is None else in_rows(add)
    if num_rows:
        with current(x.device):
            _backward_kernel[(programs,)](
                grad_y,
                source,
                weight.contiguous(),
                rstd.contiguous(),
                added,
                grad_x,
                partial,
                num_rows,
                tiles,
                *row_strides(grad_y),
                *row_strides(source),
                *row_strides(added),
                INNER=source.shape[1] if source.dim() == 3 else 1,
                WIDTH=width,
                ROWS=tile_rows,
                COLUMNS=columns,
                HAS_ADD=add is not None,
                WEIGHT_GRAD=weight_grad,
                num_warps=warps,
                enable_fp_fusion=False,  # rounds as plain torch does
            )
    return grad_x, partial.sum(0) if weight_grad else partial.new_empty(0)


@rms_norm_backward_operator.register_fake
def _rms_norm_backward_fake(
    grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, add: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if weight_grad else 0, dtype=torch.float32)


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def _backward_kernel(
    grad_y,
    x,
    weight,
    rstd,
    add,
    grad_x,
    partial,
    num_rows,
    num_tiles,
    grad_outer,
    grad_inner,
    x_outer,
    x_inner,
    add_outer,
    add_inner,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_ADD: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    column = tl.arange(0, COLUMNS)[None, :]
    in_width = column < WIDTH
    dtype = grad_x.dtype.element_ty
    factor = tl.load(weight + column, mask=in_width, other=0.0).to(dtype).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    # Without the weight's gradient there is a program for each tile, and the loop runs once.
    index = program
    while index < num_tiles:
        row = index * ROWS + tl.arange(0, ROWS)
        mask = (row < num_rows)[:, None] & in_width
        at = _row_offset(row, grad_outer, grad_inner, INNER)[:, None] + column
        grad = tl.load(grad_y + at, mask=mask, other=0.0).to(tl.float32)
        at = _row_offset(row, x_outer, x_inner, INNER)[:, None] + column
        wide = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row, mask=row < num_rows, other=0.0)[:, None]
        normal = wide * scale
        through = grad * factor
        mean = tl.sum(through * normal, axis=1)[:, None] / WIDTH
        result = (through - normal * mean) * scale
        if HAS_ADD:
            at = _row_offset(row, add_outer, add_inner, INNER)[:, None] + column
            result += tl.load(add + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x + row.to(tl.int64)[:, None] * WIDTH + column, result.to(dtype), mask=mask)
        if WEIGHT_GRAD:
            total += grad * normal.to(dtype).to(tl.float32)
        index += tl.num_programs(0)
    if WEIGHT_GRAD:
        tl.store(partial + program.to(tl.int64) * WIDTH + column, tl.sum(total, axis=0)[None, :], mask=in_width)

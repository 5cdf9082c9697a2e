"""RMSNorm's Triton kernels, as torch custom operators. Imported only where Triton is installed."""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current, in_rows, num_processors, row_strides, tile
from tunesmith.kernels.quick import quick
from tunesmith.units import ceil_div

# Where the weight's gradient is summed, programs stay and take tile after tile: as many as the registers of a
# multiprocessor hold at once, 128 for each thread of 16 warps. Each writes one float32 row of sums.
_WARPS_PER_PROCESSOR, _REGISTERS = 16, 128
# What a warp may hold of a tensor's next tile, two accesses of 16 bytes a thread: more would spill.
_BYTES_AHEAD_PER_WARP = 1024
# Columns of one program that adds the rows of sums up: a sector of memory. And its rows at once.
_SUM_COLUMNS, _SUM_ROWS = 8, 512


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
            quick(_normalise_kernel)[(ceil_div(num_rows, tile_rows),)](
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


@jit
def _row_offset(row, outer_stride, inner_stride, INNER: tl.constexpr):
    # Row r of [T, INNER, D] begins at (r // INNER) * outer + (r % INNER) * inner; of [T, D] at r * outer.
    if INNER == 1:
        offset = row.to(tl.int64) * outer_stride
    else:
        offset = (row // INNER).to(tl.int64) * outer_stride + (row % INNER).to(tl.int64) * inner_stride
    return offset


@jit(do_not_specialize=["num_rows"])
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

    Every program sums the weight's gradient over its own rows; a second launch adds those sums up. No atomics: the
    order depends on the number of the chip's multiprocessors alone.

    What has to move, with b bytes a value: 3 b T N D + 4 T N (x and grad_y read, grad_x written, rstd read), b T N D
    more with `add`. For 8,192 tokens of 32 heads of 128 in bfloat16: 202 MB. The sums are 4 D a program twice, 0.5 MB
    on 132 multiprocessors, and stay in the cache. A multiprocessor has the next tiles' reads under way while it works
    on its own: 32 KB of x and grad_y there, and 4.3 TB/s with 1 us from request to arrival take 22 KB.
    """
    width, num_rows = x.shape[-1], rstd.numel()
    grad_x = x.new_empty(x.shape)
    tile_rows, columns, warps = tile(width)
    tiles = ceil_div(num_rows, tile_rows)
    staying = max(1, _WARPS_PER_PROCESSOR // warps) * num_processors(x.device)
    ahead = weight_grad and tile_rows * columns * x.element_size() <= _BYTES_AHEAD_PER_WARP * warps
    programs = min(tiles, staying) if weight_grad else tiles
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
                AHEAD=ahead,
                num_warps=warps,
                maxnreg=_REGISTERS if ahead else None,
                enable_fp_fusion=False,  # rounds as plain torch does
            )
    return grad_x, _summed(partial) if weight_grad else partial.new_empty(0)


@rms_norm_backward_operator.register_fake
def _rms_norm_backward_fake(
    grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, add: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if weight_grad else 0, dtype=torch.float32)


def _summed(partial: Tensor) -> Tensor:
    """The sum [D] of rows [P, D]. torch's has one block for a head's few columns, and P rows keep it waiting."""
    rows, width = partial.shape
    if rows == 0:
        return partial.new_zeros(width)
    total = partial.new_empty(width)
    with current(partial.device):
        _sum_kernel[(ceil_div(width, _SUM_COLUMNS),)](
            partial, total, rows, WIDTH=width, ROWS=_SUM_ROWS, COLUMNS=_SUM_COLUMNS, num_warps=4, enable_fp_fusion=True
        )
    return total


@jit(do_not_specialize=["num_rows"])
def _sum_kernel(partial, total, num_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> None:
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_width = column < WIDTH
    found = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < num_rows)[:, None] & in_width[None, :]
        found += tl.load(partial + row.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
    tl.store(total + column, tl.sum(found, axis=0), mask=in_width)


@jit
def _load_rows(x, row, num_rows, outer, inner, INNER: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < num_rows)[:, None] & (column < WIDTH)
    return tl.load(x + _row_offset(row, outer, inner, INNER)[:, None] + column, mask=mask, other=0.0)


@jit(do_not_specialize=["num_rows", "num_tiles"])
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
    AHEAD: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    column = tl.arange(0, COLUMNS)[None, :]
    in_width = column < WIDTH
    dtype = grad_x.dtype.element_ty
    factor = tl.load(weight + column, mask=in_width, other=0.0).to(dtype).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    # Without the weight's gradient there is a program for each tile, and the loop runs once.
    index = program
    if AHEAD:
        row = index * ROWS + tl.arange(0, ROWS)
        next_grad = _load_rows(grad_y, row, num_rows, grad_outer, grad_inner, INNER, WIDTH, COLUMNS)
        next_x = _load_rows(x, row, num_rows, x_outer, x_inner, INNER, WIDTH, COLUMNS)
        if HAS_ADD:
            next_add = _load_rows(add, row, num_rows, add_outer, add_inner, INNER, WIDTH, COLUMNS)
    while index < num_tiles:
        row = index * ROWS + tl.arange(0, ROWS)
        index += tl.num_programs(0)
        scale = tl.load(rstd + row, mask=row < num_rows, other=0.0)[:, None]
        if AHEAD:
            following = index * ROWS + tl.arange(0, ROWS)
            grad, wide = next_grad.to(tl.float32), next_x.to(tl.float32)
            next_grad = _load_rows(grad_y, following, num_rows, grad_outer, grad_inner, INNER, WIDTH, COLUMNS)
            next_x = _load_rows(x, following, num_rows, x_outer, x_inner, INNER, WIDTH, COLUMNS)
        else:
            grad = _load_rows(grad_y, row, num_rows, grad_outer, grad_inner, INNER, WIDTH, COLUMNS).to(tl.float32)
            wide = _load_rows(x, row, num_rows, x_outer, x_inner, INNER, WIDTH, COLUMNS).to(tl.float32)
        normal = wide * scale
        through = grad * factor
        mean = tl.sum(through * normal, axis=1)[:, None] / WIDTH
        result = (through - normal * mean) * scale
        if HAS_ADD:
            if AHEAD:
                result += next_add.to(tl.float32)
                next_add = _load_rows(add, following, num_rows, add_outer, add_inner, INNER, WIDTH, COLUMNS)
            else:
                result += _load_rows(add, row, num_rows, add_outer, add_inner, INNER, WIDTH, COLUMNS).to(tl.float32)
        mask = (row < num_rows)[:, None] & in_width
        tl.store(grad_x + row.to(tl.int64)[:, None] * WIDTH + column, result.to(dtype), mask=mask)
        if WEIGHT_GRAD:
            total += grad * normal.to(dtype).to(tl.float32)
    if WEIGHT_GRAD:
        tl.store(partial + program.to(tl.int64) * WIDTH + column, tl.sum(total, axis=0)[None, :], mask=in_width)

"""Dropout's Triton kernel, as torch custom operators. Imported only where Triton is installed."""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current, in_rows
from tunesmith.kernels.philox import ROUNDS, WORD
from tunesmith.units import ceil_div

# Columns of each of a program's four strips: 16 bytes a thread in 16-bit formats.
_COLUMNS = 1024
_COLUMNS_PER_WARP = 256


@torch.library.custom_op("tunesmith::dropout", mutates_args=())
def dropout_operator(x: Tensor, seed: Tensor, site: int, first_row: int, threshold: int, scale: float) -> Tensor:
    """x [T, D] times `scale` where the mask keeps it, else zero; contiguous."""
    out = x.new_empty(x.shape)
    _launch(out, x, seed, site, first_row, threshold, scale, add=False)
    return out


@dropout_operator.register_fake
def _dropout_fake(x: Tensor, seed: Tensor, site: int, first_row: int, threshold: int, scale: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("tunesmith::add_dropout_", mutates_args=("out",))
def add_dropout_operator(
    out: Tensor, x: Tensor, seed: Tensor, site: int, first_row: int, threshold: int, scale: float
) -> None:
    """out [T, D], whose last stride is 1, += what `dropout` gives, unrounded."""
    _launch(out, x, seed, site, first_row, threshold, scale, add=True)


@add_dropout_operator.register_fake
def _add_dropout_fake(
    out: Tensor, x: Tensor, seed: Tensor, site: int, first_row: int, threshold: int, scale: float
) -> None:
    return None


def _launch(
    out: Tensor, x: Tensor, seed: Tensor, site: int, first_row: int, threshold: int, scale: float, add: bool
) -> None:
    rows, width = x.shape
    if not x.numel():
        return
    source, quarter = in_rows(x), ceil_div(width, 4)
    columns, warps = strip(quarter)
    with current(x.device):
        _dropout_kernel[(rows * ceil_div(quarter, columns),)](
            source,
            seed,
            out,
            source.stride(0),
            out.stride(0),
            site,
            first_row,
            threshold,
            scale,
            WIDTH=width,
            QUARTER=quarter,
            COLUMNS=columns,
            ADD=add,
            ROUNDS=ROUNDS,
            SHIFT=32 - WORD,
            num_warps=warps,
            enable_fp_fusion=False,  # rounds as plain torch does
        )


def strip(quarter: int) -> tuple[int, int]:
    """Columns of a strip, a power of two, and the warps of a program, for rows of four strips of `quarter`."""
    columns = min(_COLUMNS, 1 << max(quarter - 1, 0).bit_length())
    return columns, max(1, columns // _COLUMNS_PER_WARP)


@jit(do_not_specialize=["site", "first_row", "threshold"])
def _dropout_kernel(
    x,
    seed,
    out,
    x_stride,
    out_stride,
    site,
    first_row,
    threshold,
    scale,
    WIDTH: tl.constexpr,
    QUARTER: tl.constexpr,
    COLUMNS: tl.constexpr,
    ADD: tl.constexpr,
    ROUNDS: tl.constexpr,
    SHIFT: tl.constexpr,
) -> None:
    blocks: tl.constexpr = (QUARTER + COLUMNS - 1) // COLUMNS
    row = tl.program_id(0) // blocks
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    zero = column * 0
    # Word w of the counter at `column` belongs to column + w * QUARTER.
    words = tl.philox(tl.load(seed), column, zero + (row + first_row), zero + site, zero, ROUNDS)
    source, target = x + row.to(tl.int64) * x_stride, out + row.to(tl.int64) * out_stride
    for strip in tl.static_range(4):
        at = column + strip * QUARTER
        mask = (column < QUARTER) & (at < WIDTH)
        value = tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
        keep = (words[strip] >> SHIFT).to(tl.int32) >= threshold
        value = tl.where(keep, value * scale, 0.0)
        if ADD:
            value += tl.load(target + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(target + at, value.to(out.dtype.element_ty), mask=mask)

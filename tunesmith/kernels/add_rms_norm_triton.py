"""The kernel of kernels/add_rms_norm.py, as a torch custom operator. Imported only where Triton is installed."""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current, overlaps
from tunesmith.kernels.quick import quick

# Who is launched next may begin (and ask for its weights); what was launched before has written what is read here.
_EARLY = tl.constexpr("griddepcontrol.launch_dependents; griddepcontrol.wait; mov.b32 $0, $1;")

_VALUES_PER_WARP = 512


@torch.library.custom_op("tunesmith::add_rms_norm_", mutates_args=("stream",))
def add_rms_norm_operator(stream: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y [T, D]; the stream [T, D] becomes stream + delta."""
    num_rows, width = stream.shape
    y = torch.empty_like(stream)
    if num_rows:
        columns, warps = row_launch(width)
        overlap = {"launch_pdl": True} if overlaps(stream.device) else {}
        with current(stream.device):
            quick(_add_rms_norm_kernel)[(num_rows,)](
                stream,
                delta,
                weight.contiguous(),
                y,
                eps,
                WIDTH=width,
                COLUMNS=columns,
                OVERLAP=bool(overlap),
                num_warps=warps,
                enable_fp_fusion=False,  # rounds as plain torch does
                **overlap,
            )
    return y


@add_rms_norm_operator.register_fake
def _add_rms_norm_fake(stream: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(stream)


def row_launch(width: int) -> tuple[int, int]:
    """Columns (a power of two) and warps of a program that holds one row: few rows are the case that must be fast."""
    columns = 1 << max(width - 1, 0).bit_length()
    return columns, max(1, min(16, columns // _VALUES_PER_WARP))


@jit
def _add_rms_norm_kernel(
    stream,
    delta,
    weight,
    y,
    eps,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    column, row = tl.arange(0, COLUMNS), tl.program_id(0)
    if OVERLAP:
        # Of the row, not of the columns: what is known of those is what lets them be loaded 16 bytes at a time.
        row = tl.inline_asm_elementwise(_EARLY, "=r,r", [row], dtype=tl.int32, is_pure=False, pack=1)
    mask = column < WIDTH
    at = row.to(tl.int64) * WIDTH + column
    dtype = y.dtype.element_ty
    old = tl.load(stream + at, mask=mask, other=0.0).to(tl.float32)
    new = (old + tl.load(delta + at, mask=mask, other=0.0).to(tl.float32)).to(dtype)
    tl.store(stream + at, new, mask=mask)
    wide = new.to(tl.float32)
    scale = tl.math.rsqrt(tl.sum(wide * wide, axis=0) / WIDTH + eps)
    factor = tl.load(weight + column, mask=mask, other=0.0).to(dtype).to(tl.float32)
    tl.store(y + at, ((wide * scale).to(dtype).to(tl.float32) * factor).to(dtype), mask=mask)

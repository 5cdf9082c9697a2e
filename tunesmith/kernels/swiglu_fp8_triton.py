"""The kernel of kernels/swiglu_fp8.py, as a torch custom operator. Imported only where Triton is installed."""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, operator, var-annotated"
# Tuples grow in Triton's loops, and Triton knows no starred ones.
# ruff: noqa: RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.fp8_held_triton import code_of, scale_of
from tunesmith.kernels.fp8_weight import FP8, LARGEST, SMALLEST_SCALE
from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current, in_rows
from tunesmith.kernels.quick import quick

# Columns at a time: two loads of 16 bytes a thread for each of gate and up.
_COLUMNS = 4096
_WARPS = 8


@torch.library.custom_op("tunesmith::swiglu_rows_fp8", mutates_args=())
def swiglu_rows_operator(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [T, I] and scales float32 [T, 1] of h, gate_up [T, 2 I]."""
    source = in_rows(gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    codes = torch.empty(rows, width, dtype=FP8, device=gate_up.device)
    scale = torch.empty(rows, 1, device=gate_up.device)
    if rows:
        columns = min(_COLUMNS, triton.next_power_of_2(width))
        with current(gate_up.device):
            quick(_rows_kernel)[(rows,)](
                source,
                codes,
                scale,
                source.stride(0),
                WIDTH=width,
                COLUMNS=columns,
                INVERSE_LARGEST=1 / LARGEST,
                SMALLEST=SMALLEST_SCALE,
                num_warps=max(1, _WARPS * columns // _COLUMNS),
                enable_fp_fusion=False,  # rounds as the two kernels apart do
            )
    return codes, scale


@swiglu_rows_operator.register_fake
def _swiglu_rows_fake(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    codes = torch.empty(rows, width, dtype=FP8, device=gate_up.device)
    return codes, torch.empty(rows, 1, dtype=torch.float32, device=gate_up.device)


@jit
def _rows_kernel(
    gate_up,
    codes,
    scales,
    stride,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    INVERSE_LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    gate_up += row * stride
    codes += row * WIDTH
    lane = tl.arange(0, COLUMNS)
    largest = tl.zeros([COLUMNS], tl.float32)
    held = ()
    for start in tl.static_range(0, WIDTH, COLUMNS):
        mask = start + lane < WIDTH
        gate = tl.load(gate_up + start + lane, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up + WIDTH + start + lane, mask=mask, other=0.0).to(tl.float32)
        h = (gate * tl.sigmoid(gate) * up).to(gate_up.dtype.element_ty)
        largest = tl.maximum(largest, tl.abs(h.to(tl.float32)))
        held = held + (h,)
    scale = scale_of(tl.max(largest, axis=0), INVERSE_LARGEST, SMALLEST)
    for start in tl.static_range(0, WIDTH, COLUMNS):
        value = held[start // COLUMNS].to(tl.float32)
        tl.store(codes + start + lane, code_of(value, scale), mask=start + lane < WIDTH)
    tl.store(scales + row, scale)

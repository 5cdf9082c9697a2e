"""SwiGLU's Triton kernels, as torch custom operators. Imported only where Triton is installed."""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current, in_rows
from tunesmith.kernels.quick import quick
from tunesmith.units import ceil_div

# Columns of one program: two loads of 16 bytes a thread for each of gate and up.
_COLUMNS = 2048
_WARPS = 4


@torch.library.custom_op("tunesmith::swiglu", mutates_args=())
def swiglu_operator(gate_up: Tensor) -> Tensor:
    """h [T, I], contiguous."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    h, source = gate_up.new_empty(rows, width), in_rows(gate_up)
    if h.numel():
        with current(h.device):
            quick(_forward_kernel)[(rows * ceil_div(width, _COLUMNS),)](
                source, h, source.stride(0), WIDTH=width, COLUMNS=_COLUMNS, num_warps=_WARPS, enable_fp_fusion=False
            )
    return h


@swiglu_operator.register_fake
def _swiglu_fake(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@jit
def _forward_kernel(gate_up, h, stride, WIDTH: tl.constexpr, COLUMNS: tl.constexpr) -> None:
    row, column, mask = _place(WIDTH, COLUMNS)
    gate = tl.load(gate_up + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(h + row * WIDTH + column, (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty), mask=mask)


@jit
def _place(WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    # Programs run along a row first, so that neighbours in time are neighbours in memory.
    blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    return row, column, column < WIDTH


def swiglu_backward_on_gpu(
    grad_h: Tensor, gate_up: Tensor, want_h: bool, out: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The gradient and h, by the operator that fits `out`."""
    if out is None:
        grad, h = swiglu_backward_operator(grad_h, gate_up, want_h)
    elif out is gate_up:
        grad, h = out, swiglu_backward_in_place_operator(grad_h, gate_up, want_h)
    else:
        grad, h = out, swiglu_backward_out_operator(grad_h, gate_up, want_h, out)
    return grad, h if want_h else None


@torch.library.custom_op("tunesmith::swiglu_backward", mutates_args=())
def swiglu_backward_operator(grad_h: Tensor, gate_up: Tensor, want_h: bool) -> tuple[Tensor, Tensor]:
    """The gradient of gate_up, and h (empty where it is not wanted)."""
    grad = gate_up.new_empty(gate_up.shape)
    return grad, _backward(grad_h, gate_up, want_h, grad)


@swiglu_backward_operator.register_fake
def _swiglu_backward_fake(grad_h: Tensor, gate_up: Tensor, want_h: bool) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty(gate_up.shape), _empty_h(gate_up, want_h)


@torch.library.custom_op("tunesmith::swiglu_backward_", mutates_args=("gate_up",))
def swiglu_backward_in_place_operator(grad_h: Tensor, gate_up: Tensor, want_h: bool) -> Tensor:
    """gate_up becomes its gradient; h is returned (empty where it is not wanted)."""
    return _backward(grad_h, gate_up, want_h, gate_up)


@swiglu_backward_in_place_operator.register_fake
def _swiglu_backward_in_place_fake(grad_h: Tensor, gate_up: Tensor, want_h: bool) -> Tensor:
    return _empty_h(gate_up, want_h)


@torch.library.custom_op("tunesmith::swiglu_backward_out", mutates_args=("out",))
def swiglu_backward_out_operator(grad_h: Tensor, gate_up: Tensor, want_h: bool, out: Tensor) -> Tensor:
    """The gradient is written to `out`; h is returned (empty where it is not wanted)."""
    return _backward(grad_h, gate_up, want_h, out)


@swiglu_backward_out_operator.register_fake
def _swiglu_backward_out_fake(grad_h: Tensor, gate_up: Tensor, want_h: bool, out: Tensor) -> Tensor:
    return _empty_h(gate_up, want_h)


def _empty_h(gate_up: Tensor, want_h: bool) -> Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    return gate_up.new_empty((rows, width) if want_h else (0, width))


def _backward(grad_h: Tensor, gate_up: Tensor, want_h: bool, out: Tensor) -> Tensor:
    """h or nothing; the gradient goes to `out`."""
    if out.stride(-1) != 1:
        target = torch.empty_like(out, memory_format=torch.contiguous_format)
        h = _backward(grad_h, gate_up, want_h, target)
        out.copy_(target)
        return h
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    h, grad_h, source = _empty_h(gate_up, want_h), in_rows(grad_h), in_rows(gate_up)
    if gate_up.numel():
        with current(h.device):
            _backward_kernel[(rows * ceil_div(width, _COLUMNS),)](
                grad_h,
                source,
                out,
                h,
                grad_h.stride(0),
                source.stride(0),
                out.stride(0),
                WANT_H=want_h,
                WIDTH=width,
                COLUMNS=_COLUMNS,
                num_warps=_WARPS,
                enable_fp_fusion=False,  # rounds as plain torch does
            )
    return h


@jit
def _backward_kernel(
    grad_h,
    gate_up,
    out,
    h,
    grad_stride,
    stride,
    out_stride,
    WANT_H: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row, column, mask = _place(WIDTH, COLUMNS)
    gate = tl.load(gate_up + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_h + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    if WANT_H:
        tl.store(h + row * WIDTH + column, (silu * up).to(h.dtype.element_ty), mask=mask)
    grad_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    dtype = out.dtype.element_ty
    tl.store(out + row * out_stride + column, grad_gate.to(dtype), mask=mask)
    tl.store(out + row * out_stride + WIDTH + column, (grad * silu).to(dtype), mask=mask)

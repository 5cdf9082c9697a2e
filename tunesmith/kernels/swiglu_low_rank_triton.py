"""The Triton kernels of SwiGLU with the adapters' sums, as torch custom operators. Imported only where Triton is.

A program owns a tile's columns and goes down a few tiles of rows: its part of `up` comes from the first-level cache
then, and the skinny products hide behind the loads of the activations.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current, in_rows
from tunesmith.units import ceil_div

# Forward and backward: a tile's rows, and how many tiles below each other a program goes through. The fastest of 20
# measured on an H200 at 8,192 x 2 x 18,944 with ranks 32 and 16: 0.34 and 0.71 ms (SwiGLU alone: 0.27 and 0.51).
ROWS, BACKWARD_ROWS = 64, 32
STEPS, BACKWARD_STEPS = 1, 16
COLUMNS = 64
WARPS = 4
# The most of a rank that is multiplied at once, and the least that a matrix unit takes.
_WIDEST_CHUNK = 64
_LEAST_CHUNK = 16


def chunk_of(rank: int, dtype: torch.dtype) -> int:
    """How much of the rank one product takes. In float32, which has no matrix unit here, registers are dear."""
    if dtype == torch.float32:
        return _LEAST_CHUNK
    return max(_LEAST_CHUNK, min(_WIDEST_CHUNK, triton.next_power_of_2(max(1, rank))))


def factors(left: Tensor | None, right: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Both factors as the kernels read them, the rank (0: there are none) and its chunk."""
    if left is None or right is None:
        return like, like, 0, _LEAST_CHUNK
    rank = left.shape[1]
    left, right = left.to(like.dtype).contiguous(), right.to(like.dtype).contiguous()
    return left, right, rank, chunk_of(rank, like.dtype)


@torch.library.custom_op("tunesmith::swiglu_low_rank", mutates_args=())
def swiglu_low_rank_operator(gate_up: Tensor, low: Tensor, up: Tensor) -> Tensor:
    """h [T, I], contiguous."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    h, source = gate_up.new_empty(rows, width), in_rows(gate_up)
    low, up, rank, chunk = factors(low, up, gate_up)
    if h.numel():
        with current(h.device):
            _forward_kernel[(ceil_div(rows, ROWS * STEPS) * ceil_div(width, COLUMNS),)](
                source,
                low,
                up,
                h,
                rows,
                source.stride(0),
                WIDTH=width,
                RANK=rank,
                CHUNK=chunk,
                ROWS=ROWS,
                COLUMNS=COLUMNS,
                STEPS=STEPS,
                num_warps=WARPS,
                num_stages=1,
                enable_fp_fusion=False,
            )
    return h


@swiglu_low_rank_operator.register_fake
def _swiglu_low_rank_fake(gate_up: Tensor, low: Tensor, up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@jit
def tile_at(pointer, row, column, num_rows, stride, WIDTH: tl.constexpr):
    """Where a tile's values lie, and which of them exist."""
    at = row.to(tl.int64)[:, None] * stride + column[None, :]
    return pointer + at, (row < num_rows)[:, None] & (column < WIDTH)[None, :]


@jit
def load_pair(gate_up, row, column, num_rows, stride, WIDTH: tl.constexpr):
    """gate and up of a tile as they are held."""
    at, mask = tile_at(gate_up, row, column, num_rows, stride, WIDTH)
    return tl.load(at, mask=mask, other=0.0), tl.load(at + WIDTH, mask=mask, other=0.0)


@jit
def _left_chunk(left, row, k, num_rows, RANK: tl.constexpr):
    at = left + row.to(tl.int64)[:, None] * RANK + k[None, :]
    return tl.load(at, mask=(row < num_rows)[:, None] & (k < RANK)[None, :], other=0.0)


@jit
def _up_chunk(up, column, k, WIDTH: tl.constexpr, RANK: tl.constexpr):
    # Read along the rank, as it lies in memory, then turned.
    at = up + column[:, None] * RANK + k[None, :]
    return tl.trans(tl.load(at, mask=(column < WIDTH)[:, None] & (k < RANK)[None, :], other=0.0))


@jit
def pair_with_sums(
    gate, value, low, up, row, column, num_rows, WIDTH: tl.constexpr, RANK: tl.constexpr, CHUNK: tl.constexpr
):
    """gate and up of a tile in float32, the adapters' sums in. Products first: the loads are still under way."""
    if RANK > 0:
        of_gate = tl.zeros(gate.shape, tl.float32)
        of_value = tl.zeros(gate.shape, tl.float32)
        for start in tl.static_range(0, RANK, CHUNK):
            k = start + tl.arange(0, CHUNK)
            left = _left_chunk(low, row, k, num_rows, RANK)
            to_gate = _up_chunk(up, column, k, WIDTH, RANK)
            to_value = _up_chunk(up + WIDTH * RANK, column, k, WIDTH, RANK)
            of_gate = tl.dot(left, to_gate, of_gate, input_precision="ieee")
            of_value = tl.dot(left, to_value, of_value, input_precision="ieee")
        wide_gate = gate.to(tl.float32) + of_gate
        wide_value = value.to(tl.float32) + of_value
    else:
        wide_gate = gate.to(tl.float32)
        wide_value = value.to(tl.float32)
    return wide_gate, wide_value


@jit
def grad_with_sum(
    grad, dlow, down, row, column, num_rows, WIDTH: tl.constexpr, RANK: tl.constexpr, CHUNK: tl.constexpr
):
    """grad_h of a tile in float32, the adapters' sum in."""
    if RANK > 0:
        total = tl.zeros(grad.shape, tl.float32)
        for start in tl.static_range(0, RANK, CHUNK):
            k = start + tl.arange(0, CHUNK)
            left = _left_chunk(dlow, row, k, num_rows, RANK)
            at = down + k[:, None] * WIDTH + column[None, :]
            right = tl.load(at, mask=(k < RANK)[:, None] & (column < WIDTH)[None, :], other=0.0)
            total = tl.dot(left, right, total, input_precision="ieee")
        wide = grad.to(tl.float32) + total
    else:
        wide = grad.to(tl.float32)
    return wide


@jit
def swiglu_gradients(grad, gate, value):
    """h and the gradients of gate and up, in float32."""
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    return silu * value, grad * value * sigmoid * (1 + gate * (1 - sigmoid)), grad * silu


@jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    gate_up,
    low,
    up,
    h,
    num_rows,
    stride,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    first, column = _place(WIDTH, ROWS * STEPS, COLUMNS)
    for step in range(STEPS):
        row = first + step * ROWS + tl.arange(0, ROWS)
        gate, value = load_pair(gate_up, row, column, num_rows, stride, WIDTH)
        gate, value = pair_with_sums(gate, value, low, up, row, column, num_rows, WIDTH, RANK, CHUNK)
        at, mask = tile_at(h, row, column, num_rows, WIDTH, WIDTH)
        tl.store(at, (gate * tl.sigmoid(gate) * value).to(h.dtype.element_ty), mask=mask)


@jit
def _place(WIDTH: tl.constexpr, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr):
    # Programs run along the rows first, so that neighbours in time are neighbours in memory.
    blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    first = (tl.program_id(0) // blocks) * HEIGHT
    return first, (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)


def swiglu_low_rank_backward_on_gpu(
    grad_h: Tensor,
    gate_up: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    dlow: Tensor | None,
    down: Tensor | None,
    want_h: bool,
    out: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The gradient and h, by the operator that fits `out`."""
    arguments = (grad_h, gate_up, low, up, dlow, down, want_h)
    if out is None:
        grad, h = swiglu_low_rank_backward_operator(*arguments)
    elif out is gate_up:
        grad, h = out, swiglu_low_rank_backward_in_place_operator(*arguments)
    else:
        grad, h = out, swiglu_low_rank_backward_out_operator(*arguments, out)
    return grad, h if want_h else None


@torch.library.custom_op("tunesmith::swiglu_low_rank_backward", mutates_args=())
def swiglu_low_rank_backward_operator(
    grad_h: Tensor,
    gate_up: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    dlow: Tensor | None,
    down: Tensor | None,
    want_h: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of gate_up, and h (empty where it is not wanted)."""
    grad = gate_up.new_empty(gate_up.shape)
    return grad, _backward(grad_h, gate_up, low, up, dlow, down, want_h, grad)


@swiglu_low_rank_backward_operator.register_fake
def _backward_fake(
    grad_h: Tensor,
    gate_up: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    dlow: Tensor | None,
    down: Tensor | None,
    want_h: bool,
) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty(gate_up.shape), empty_h(gate_up, want_h)


@torch.library.custom_op("tunesmith::swiglu_low_rank_backward_", mutates_args=("gate_up",))
def swiglu_low_rank_backward_in_place_operator(
    grad_h: Tensor,
    gate_up: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    dlow: Tensor | None,
    down: Tensor | None,
    want_h: bool,
) -> Tensor:
    """gate_up becomes its gradient; h is returned (empty where it is not wanted)."""
    return _backward(grad_h, gate_up, low, up, dlow, down, want_h, gate_up)


@swiglu_low_rank_backward_in_place_operator.register_fake
def _backward_in_place_fake(
    grad_h: Tensor,
    gate_up: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    dlow: Tensor | None,
    down: Tensor | None,
    want_h: bool,
) -> Tensor:
    return empty_h(gate_up, want_h)


@torch.library.custom_op("tunesmith::swiglu_low_rank_backward_out", mutates_args=("out",))
def swiglu_low_rank_backward_out_operator(
    grad_h: Tensor,
    gate_up: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    dlow: Tensor | None,
    down: Tensor | None,
    want_h: bool,
    out: Tensor,
) -> Tensor:
    """The gradient is written to `out`; h is returned (empty where it is not wanted)."""
    return _backward(grad_h, gate_up, low, up, dlow, down, want_h, out)


@swiglu_low_rank_backward_out_operator.register_fake
def _backward_out_fake(
    grad_h: Tensor,
    gate_up: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    dlow: Tensor | None,
    down: Tensor | None,
    want_h: bool,
    out: Tensor,
) -> Tensor:
    return empty_h(gate_up, want_h)


def empty_h(gate_up: Tensor, want_h: bool) -> Tensor:
    """Memory for h [T, I]; of no rows where it is not wanted."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    return gate_up.new_empty((rows, width) if want_h else (0, width))


def _backward(
    grad_h: Tensor,
    gate_up: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    dlow: Tensor | None,
    down: Tensor | None,
    want_h: bool,
    out: Tensor,
) -> Tensor:
    """h or nothing; the gradient goes to `out`."""
    if out.stride(-1) != 1:
        target = torch.empty_like(out, memory_format=torch.contiguous_format)
        h = _backward(grad_h, gate_up, low, up, dlow, down, want_h, target)
        out.copy_(target)
        return h
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    h, grad_h, source = empty_h(gate_up, want_h), in_rows(grad_h), in_rows(gate_up)
    left, right, rank, chunk = factors(low, up, gate_up)
    grad_left, grad_right, grad_rank, grad_chunk = factors(dlow, down, gate_up)
    if gate_up.numel():
        with current(h.device):
            _backward_kernel[(ceil_div(rows, BACKWARD_ROWS * BACKWARD_STEPS) * ceil_div(width, COLUMNS),)](
                grad_h,
                source,
                left,
                right,
                grad_left,
                grad_right,
                out,
                h,
                rows,
                grad_h.stride(0),
                source.stride(0),
                out.stride(0),
                WANT_H=want_h,
                WIDTH=width,
                RANK=rank,
                CHUNK=chunk,
                GRAD_RANK=grad_rank,
                GRAD_CHUNK=grad_chunk,
                ROWS=BACKWARD_ROWS,
                COLUMNS=COLUMNS,
                STEPS=BACKWARD_STEPS,
                num_warps=WARPS,
                num_stages=1,
                enable_fp_fusion=False,
            )
    return h


@jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    grad_h,
    gate_up,
    low,
    up,
    dlow,
    down,
    out,
    h,
    num_rows,
    grad_stride,
    stride,
    out_stride,
    WANT_H: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    CHUNK: tl.constexpr,
    GRAD_RANK: tl.constexpr,
    GRAD_CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    first, column = _place(WIDTH, ROWS * STEPS, COLUMNS)
    dtype = out.dtype.element_ty
    for step in range(STEPS):
        row = first + step * ROWS + tl.arange(0, ROWS)
        # Every load of an activation is under way before the first product.
        gate, value = load_pair(gate_up, row, column, num_rows, stride, WIDTH)
        at, mask = tile_at(grad_h, row, column, num_rows, grad_stride, WIDTH)
        grad = tl.load(at, mask=mask, other=0.0)
        gate, value = pair_with_sums(gate, value, low, up, row, column, num_rows, WIDTH, RANK, CHUNK)
        grad = grad_with_sum(grad, dlow, down, row, column, num_rows, WIDTH, GRAD_RANK, GRAD_CHUNK)
        hidden, to_gate, to_value = swiglu_gradients(grad, gate, value)
        if WANT_H:
            at, mask = tile_at(h, row, column, num_rows, WIDTH, WIDTH)
            tl.store(at, hidden.to(dtype), mask=mask)
        at, mask = tile_at(out, row, column, num_rows, out_stride, WIDTH)
        tl.store(at, to_gate.to(dtype), mask=mask)
        tl.store(at + WIDTH, to_value.to(dtype), mask=mask)

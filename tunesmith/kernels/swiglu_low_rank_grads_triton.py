"""The Triton kernel of SwiGLU's gradient with those of the adapters, as a torch custom operator. Imported only where
Triton is.

A program owns a tile's columns and goes down a range of tokens; its parts of the adapters' gradients stay in registers
on the way and are written once a range. The ranges are added up by torch, in one order: no atomic operations.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import LEAST_SHARED_BYTES, current, in_rows, shared_bytes
from tunesmith.kernels.swiglu_low_rank_triton import (
    factors,
    grad_with_sum,
    load_pair,
    pair_with_sums,
    swiglu_gradients,
    tile_at,
)
from tunesmith.units import ceil_div

# A tile, and how many of them below each other make a range: 1,024 tokens, so that 8,192 tokens of a 7B model's layer
# are 2,368 programs, and what they write of the sums is 48 MB beside 1.9 GB of activations. No other was tried.
ROWS, COLUMNS, STEPS = 32, 64, 32
WARPS = 4
# Tiles of activations on their way at once. With 1 a program waits for its tile's 12 KiB, computes, then asks for the
# next; with more the next ones are copied to shared memory meanwhile, to the same bits. On an H200, 1, 2, 3: 8,192
# tokens of a 7B's layer 0.685, 0.616, 0.595 ms, 2,048 of a 3B's 0.108, 0.100, 0.068. Where processors have less
# shared memory, two programs of 3 would not fit.
STAGES, MOST_STAGES = 2, 3


@torch.library.custom_op("tunesmith::swiglu_low_rank_grads", mutates_args=("gate_up",))
def swiglu_low_rank_grads_operator(
    grad_h: Tensor, gate_up: Tensor, low: Tensor, up: Tensor, dlow: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    """gate_up becomes its gradient; the gradients of `up` [2I, R] and of `down` [S, I], float32."""
    if gate_up.stride(-1) != 1:
        held = gate_up.contiguous()
        made = _launch(grad_h, held, low, up, dlow, down)
        gate_up.copy_(held)
        return made
    return _launch(grad_h, gate_up, low, up, dlow, down)


@swiglu_low_rank_grads_operator.register_fake
def _grads_fake(
    grad_h: Tensor, gate_up: Tensor, low: Tensor, up: Tensor, dlow: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    return _sums(gate_up, low, dlow)


def _sums(gate_up: Tensor, low: Tensor, dlow: Tensor) -> tuple[Tensor, Tensor]:
    width, wide = gate_up.shape[1], torch.float32
    return gate_up.new_empty((width, low.shape[1]), dtype=wide), gate_up.new_empty(
        (dlow.shape[1], width // 2), dtype=wide
    )


def _launch(
    grad_h: Tensor, gate_up: Tensor, low: Tensor, up: Tensor, dlow: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    if gate_up.numel() == 0:
        of_up, of_down = _sums(gate_up, low, dlow)
        return of_up.zero_(), of_down.zero_()
    left, right, rank, chunk = factors(low, up, gate_up)
    grad_left, grad_right, grad_rank, grad_chunk = factors(dlow, down, gate_up)
    grad_h, ranges = in_rows(grad_h), ceil_div(rows, ROWS * STEPS)
    of_up = gate_up.new_empty((ranges, 2 * width, rank), dtype=torch.float32)
    of_down = gate_up.new_empty((ranges, grad_rank, width), dtype=torch.float32)
    with current(gate_up.device):
        _grads_kernel[(ranges * ceil_div(width, COLUMNS),)](
            grad_h,
            gate_up,
            left,
            right,
            grad_left,
            grad_right,
            of_up,
            of_down,
            rows,
            grad_h.stride(0),
            gate_up.stride(0),
            WIDTH=width,
            RANK=rank,
            CHUNK=_whole(rank, chunk),
            GRAD_RANK=grad_rank,
            GRAD_CHUNK=_whole(grad_rank, grad_chunk),
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            STEPS=STEPS,
            STAGES=stages(gate_up.device),
            num_warps=WARPS,
            num_stages=1,
            enable_fp_fusion=False,
        )
    return of_up.sum(0), of_down.sum(0)


def stages(device: torch.device) -> int:
    """Tiles on their way at once on this device."""
    return MOST_STAGES if shared_bytes(device) > LEAST_SHARED_BYTES else STAGES


def _whole(rank: int, chunk: int) -> int:
    """A chunk that holds the whole rank: the sums are."""
    return max(chunk, triton.next_power_of_2(rank))


@jit(do_not_specialize=["num_rows"])
def _grads_kernel(
    grad_h,
    gate_up,
    low,
    up,
    dlow,
    down,
    of_up,
    of_down,
    num_rows,
    grad_stride,
    stride,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    CHUNK: tl.constexpr,
    GRAD_RANK: tl.constexpr,
    GRAD_CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    BLOCKS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    group = tl.program_id(0) // BLOCKS
    column = (tl.program_id(0) % BLOCKS) * COLUMNS + tl.arange(0, COLUMNS)
    rank, grad_rank = tl.arange(0, CHUNK), tl.arange(0, GRAD_CHUNK)
    dtype = gate_up.dtype.element_ty
    of_gate = tl.zeros([COLUMNS, CHUNK], tl.float32)
    of_value = tl.zeros([COLUMNS, CHUNK], tl.float32)
    of_hidden = tl.zeros([COLUMNS, GRAD_CHUNK], tl.float32)
    # Tiles ahead are read before this one is written in place: their rows are others.
    for step in tl.range(STEPS, num_stages=STAGES):
        row = (group * STEPS + step) * ROWS + tl.arange(0, ROWS)
        # Every load of an activation is under way before the first product.
        gate, value = load_pair(gate_up, row, column, num_rows, stride, WIDTH)
        at, mask = tile_at(grad_h, row, column, num_rows, grad_stride, WIDTH)
        grad = tl.load(at, mask=mask, other=0.0)
        at, mask = tile_at(low, row, rank, num_rows, RANK, RANK)
        left = tl.load(at, mask=mask, other=0.0)
        at, mask = tile_at(dlow, row, grad_rank, num_rows, GRAD_RANK, GRAD_RANK)
        grad_left = tl.load(at, mask=mask, other=0.0)
        gate, value = pair_with_sums(gate, value, low, up, row, column, num_rows, WIDTH, RANK, CHUNK)
        grad = grad_with_sum(grad, dlow, down, row, column, num_rows, WIDTH, GRAD_RANK, GRAD_CHUNK)
        hidden, to_gate, to_value = swiglu_gradients(grad, gate, value)
        hidden, to_gate, to_value = hidden.to(dtype), to_gate.to(dtype), to_value.to(dtype)
        at, mask = tile_at(gate_up, row, column, num_rows, stride, WIDTH)
        tl.store(at, to_gate, mask=mask)
        tl.store(at + WIDTH, to_value, mask=mask)
        of_gate = _add_product(of_gate, to_gate, left)
        of_value = _add_product(of_value, to_value, left)
        of_hidden = _add_product(of_hidden, hidden, grad_left)
    at, mask = tile_at(of_up + group.to(tl.int64) * 2 * WIDTH * RANK, column, rank, WIDTH, RANK, RANK)
    tl.store(at, of_gate, mask=mask)
    tl.store(at + WIDTH * RANK, of_value, mask=mask)
    at, mask = tile_at(of_down + group.to(tl.int64) * GRAD_RANK * WIDTH, grad_rank, column, GRAD_RANK, WIDTH, WIDTH)
    tl.store(at, tl.trans(of_hidden), mask=mask)


@jit
def _add_product(total, activation, skinny):
    """total + activation.T @ skinny."""
    return tl.dot(tl.trans(activation.to(skinny.dtype)), skinny, total, input_precision="ieee")

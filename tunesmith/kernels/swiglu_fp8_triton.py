"""The Triton kernels of SwiGLU with fp8 codes, as torch custom operators. Imported only where Triton is installed.

A row's codes need its largest value, which no tile knows. One launch holds two kinds of programs, in this order:

    tiles of group 0 | tiles of group 1 | codes of group 0 | tiles of group 2 | codes of group 1 | ...

A group is a few rows over the whole width. Its tiles are written, each row's largest value with them (the maximum of
its bits: the same in any order), and the codes are made from what was written while the cache still holds it.
Programs take their place in the order from a counter, so that a program waits only for such as have started already
and wait for nothing themselves: it ends on any chip, however few programs run at once.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.fp8 import FP8, LARGEST, SMALLEST_SCALE
from tunesmith.kernels.fp8_triton import code_of, scale_of
from tunesmith.kernels.launch import current, in_rows, num_processors
from tunesmith.kernels.swiglu_low_rank_triton import (
    empty_h,
    factors,
    grad_with_sum,
    load_pair,
    pair_with_sums,
    swiglu_gradients,
    tile_at,
)
from tunesmith.units import ceil_div

# A tile, and how many of them below each other make a group.
ROWS, COLUMNS, STEPS = 64, 64, 2
WARPS = 8
# About how many programs of one multiprocessor run at once: so far apart lie a group's tiles and its codes.
_PROGRAMS_PER_PROCESSOR = 3


class _Plan:
    """The order of the programs for one shape, and the counters they share, all 0: a row's largest, groups, tickets."""

    def __init__(self, h: Tensor) -> None:
        rows, width, device = *h.shape, h.device
        self.blocks = ceil_div(width, COLUMNS)
        self.groups = ceil_div(rows, ROWS * STEPS)
        self.behind = max(1, ceil_div(_PROGRAMS_PER_PROCESSOR * num_processors(device), 2 * self.blocks))
        self.grid = ((self.groups + self.behind) * 2 * self.blocks,)
        counters = torch.zeros(rows + self.groups + 1, dtype=torch.int32, device=device)
        self.largest, self.done, self.ticket = counters.split([rows, self.groups, 1])


def _constants() -> dict[str, Any]:
    tiles = {"ROWS": ROWS, "COLUMNS": COLUMNS, "STEPS": STEPS, "num_warps": WARPS, "num_stages": 1}
    return {**tiles, "INVERSE_LARGEST": 1 / LARGEST, "SMALLEST": SMALLEST_SCALE, "enable_fp_fusion": False}


def _empty_codes(like: Tensor) -> tuple[Tensor, Tensor]:
    return like.new_empty(like.shape, dtype=FP8), like.new_empty((like.shape[0], 1), dtype=torch.float32)


@torch.library.custom_op("tunesmith::swiglu_fp8", mutates_args=())
def swiglu_fp8_operator(gate_up: Tensor, low: Tensor | None, up: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """h [T, I] contiguous, its codes and its scales."""
    h, source = empty_h(gate_up, True), in_rows(gate_up)
    codes, scale = _empty_codes(h)
    if h.numel() == 0:
        return h, codes, scale.fill_(SMALLEST_SCALE)
    left, right, rank, chunk = factors(low, up, gate_up)
    plan = _Plan(h)
    with current(h.device):
        _forward_kernel[plan.grid](
            source,
            left,
            right,
            h,
            codes,
            scale,
            plan.largest,
            plan.done,
            plan.ticket,
            h.shape[0],
            plan.groups,
            plan.behind,
            source.stride(0),
            WIDTH=h.shape[1],
            RANK=rank,
            CHUNK=chunk,
            **_constants(),
        )
    return h, codes, scale


@swiglu_fp8_operator.register_fake
def _swiglu_fp8_fake(gate_up: Tensor, low: Tensor | None, up: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    h = empty_h(gate_up, True)
    return h, *_empty_codes(h)


@triton.jit
def _place(ticket, BLOCKS: tl.constexpr):
    """Which step of the order this program belongs to, whether it makes codes, and its columns' block."""
    stage = tl.atomic_add(ticket, 1, sem="relaxed")
    return (stage // BLOCKS) // 2, (stage // BLOCKS) % 2, stage % BLOCKS


@triton.jit
def _magnitude(value):
    # Of magnitudes the bits have the order of the numbers, infinity and NaN above all.
    return tl.abs(value).to(tl.int32, bitcast=True)


@triton.jit
def _note_largest(largest, row, num_rows, magnitude):
    tl.atomic_max(largest + row, tl.max(magnitude, axis=1), mask=row < num_rows, sem="relaxed")


@triton.jit
def _finish(done):
    tl.debug_barrier()  # every thread's stores before the one that announces them
    tl.atomic_add(done, 1, sem="release")


@triton.jit
def _wait(done, BLOCKS: tl.constexpr):
    while tl.atomic_add(done, 0, sem="acquire") < BLOCKS:
        pass
    tl.debug_barrier()


@triton.jit
def _row_scale(largest, scales, row, num_rows, block, INVERSE_LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    bits = tl.load(largest + row, mask=row < num_rows, other=0, cache_modifier=".cg")
    scale = scale_of(bits.to(tl.float32, bitcast=True), INVERSE_LARGEST, SMALLEST)
    if block == 0:
        tl.store(scales + row, scale, mask=row < num_rows)
    return scale[:, None]


@triton.jit(do_not_specialize=["num_rows", "num_groups", "num_behind"])
def _forward_kernel(
    gate_up,
    low,
    up,
    h,
    codes,
    scales,
    largest,
    done,
    ticket,
    num_rows,
    num_groups,
    num_behind,
    stride,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    INVERSE_LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
) -> None:
    BLOCKS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    group, makes_codes, block = _place(ticket, BLOCKS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    if makes_codes == 0:
        if group < num_groups:
            for step in range(STEPS):
                row = (group * STEPS + step) * ROWS + tl.arange(0, ROWS)
                gate, value = load_pair(gate_up, row, column, num_rows, stride, WIDTH)
                gate, value = pair_with_sums(gate, value, low, up, row, column, num_rows, WIDTH, RANK, CHUNK)
                result = (gate * tl.sigmoid(gate) * value).to(h.dtype.element_ty)
                at, mask = tile_at(h, row, column, num_rows, WIDTH, WIDTH)
                tl.store(at, result, mask=mask)
                _note_largest(largest, row, num_rows, _magnitude(result.to(tl.float32)))
            _finish(done + group)
    elif group >= num_behind:
        group -= num_behind
        _wait(done + group, BLOCKS)
        for step in range(STEPS):
            row = (group * STEPS + step) * ROWS + tl.arange(0, ROWS)
            scale = _row_scale(largest, scales, row, num_rows, block, INVERSE_LARGEST, SMALLEST)
            at, mask = tile_at(h, row, column, num_rows, WIDTH, WIDTH)
            value = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
            at, mask = tile_at(codes, row, column, num_rows, WIDTH, WIDTH)
            tl.store(at, code_of(value, scale), mask=mask)


def swiglu_fp8_backward_on_gpu(
    grad_h: Tensor,
    gate_up: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    dlow: Tensor | None,
    down: Tensor | None,
    want_h: bool,
    fold: Tensor | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The gradient, h, codes and scales, by the operator that fits `out`."""
    arguments = (grad_h, gate_up, low, up, dlow, down, want_h, fold)
    if out is gate_up:
        h, codes, scale = swiglu_fp8_backward_in_place_operator(*arguments)
    else:
        out = torch.empty_like(gate_up, memory_format=torch.contiguous_format) if out is None else out
        h, codes, scale = swiglu_fp8_backward_out_operator(*arguments, out)
    return out, h if want_h else None, codes, scale


@torch.library.custom_op("tunesmith::swiglu_fp8_backward_", mutates_args=("gate_up",))
def swiglu_fp8_backward_in_place_operator(
    grad_h: Tensor,
    gate_up: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    dlow: Tensor | None,
    down: Tensor | None,
    want_h: bool,
    fold: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """gate_up becomes its gradient; h (empty where it is not wanted), the gradient's codes and its scales."""
    return _backward(grad_h, gate_up, low, up, dlow, down, want_h, fold, gate_up)


@torch.library.custom_op("tunesmith::swiglu_fp8_backward_out", mutates_args=("out",))
def swiglu_fp8_backward_out_operator(
    grad_h: Tensor,
    gate_up: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    dlow: Tensor | None,
    down: Tensor | None,
    want_h: bool,
    fold: Tensor | None,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient is written to `out`; h (empty where it is not wanted), the gradient's codes and its scales."""
    return _backward(grad_h, gate_up, low, up, dlow, down, want_h, fold, out)


@swiglu_fp8_backward_in_place_operator.register_fake
@swiglu_fp8_backward_out_operator.register_fake
def _backward_fake(
    grad_h: Tensor,
    gate_up: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    dlow: Tensor | None,
    down: Tensor | None,
    want_h: bool,
    fold: Tensor | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_h(gate_up, want_h), *_empty_codes(gate_up)


def _backward(
    grad_h: Tensor,
    gate_up: Tensor,
    low: Tensor | None,
    up: Tensor | None,
    dlow: Tensor | None,
    down: Tensor | None,
    want_h: bool,
    fold: Tensor | None,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """h or nothing, codes and scales; the gradient goes to `out`."""
    if out.stride(-1) != 1:
        target = torch.empty_like(out, memory_format=torch.contiguous_format)
        made = _backward(grad_h, gate_up, low, up, dlow, down, want_h, fold, target)
        out.copy_(target)
        return made
    h, grad_h, source = empty_h(gate_up, want_h), in_rows(grad_h), in_rows(gate_up)
    codes, scale = _empty_codes(gate_up)
    if gate_up.numel() == 0:
        return h, codes, scale.fill_(SMALLEST_SCALE)
    left, right, rank, chunk = factors(low, up, gate_up)
    grad_left, grad_right, grad_rank, grad_chunk = factors(dlow, down, gate_up)
    plan = _Plan(grad_h)
    with current(gate_up.device):
        _backward_kernel[plan.grid](
            grad_h,
            source,
            left,
            right,
            grad_left,
            grad_right,
            scale if fold is None else fold.contiguous(),
            out,
            h,
            codes,
            scale,
            plan.largest,
            plan.done,
            plan.ticket,
            gate_up.shape[0],
            plan.groups,
            plan.behind,
            grad_h.stride(0),
            source.stride(0),
            out.stride(0),
            WANT_H=want_h,
            FOLD=fold is not None,
            WIDTH=gate_up.shape[1] // 2,
            RANK=rank,
            CHUNK=chunk,
            GRAD_RANK=grad_rank,
            GRAD_CHUNK=grad_chunk,
            **_constants(),
        )
    return h, codes, scale


@triton.jit
def _folded(value, fold, column, WIDTH: tl.constexpr, FOLD: tl.constexpr):
    wide = value.to(tl.float32)
    if FOLD:
        wide *= tl.load(fold + column, mask=column < WIDTH, other=0.0)[None, :]
    return wide


@triton.jit(do_not_specialize=["num_rows", "num_groups", "num_behind"])
def _backward_kernel(
    grad_h,
    gate_up,
    low,
    up,
    dlow,
    down,
    fold,
    out,
    h,
    codes,
    scales,
    largest,
    done,
    ticket,
    num_rows,
    num_groups,
    num_behind,
    grad_stride,
    stride,
    out_stride,
    WANT_H: tl.constexpr,
    FOLD: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    CHUNK: tl.constexpr,
    GRAD_RANK: tl.constexpr,
    GRAD_CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    INVERSE_LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
) -> None:
    BLOCKS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    group, makes_codes, block = _place(ticket, BLOCKS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    if makes_codes == 0:
        if group < num_groups:
            for step in range(STEPS):
                row = (group * STEPS + step) * ROWS + tl.arange(0, ROWS)
                gate, value = load_pair(gate_up, row, column, num_rows, stride, WIDTH)
                at, mask = tile_at(grad_h, row, column, num_rows, grad_stride, WIDTH)
                grad = tl.load(at, mask=mask, other=0.0)
                gate, value = pair_with_sums(gate, value, low, up, row, column, num_rows, WIDTH, RANK, CHUNK)
                grad = grad_with_sum(grad, dlow, down, row, column, num_rows, WIDTH, GRAD_RANK, GRAD_CHUNK)
                hidden, to_gate, to_value = swiglu_gradients(grad, gate, value)
                dtype = out.dtype.element_ty
                if WANT_H:
                    at, mask = tile_at(h, row, column, num_rows, WIDTH, WIDTH)
                    tl.store(at, hidden.to(dtype), mask=mask)
                at, mask = tile_at(out, row, column, num_rows, out_stride, WIDTH)
                tl.store(at, to_gate.to(dtype), mask=mask)
                tl.store(at + WIDTH, to_value.to(dtype), mask=mask)
                first = _magnitude(_folded(to_gate.to(dtype), fold, column, WIDTH, FOLD))
                second = _magnitude(_folded(to_value.to(dtype), fold + WIDTH, column, WIDTH, FOLD))
                _note_largest(largest, row, num_rows, tl.maximum(first, second))
            _finish(done + group)
    elif group >= num_behind:
        group -= num_behind
        _wait(done + group, BLOCKS)
        for step in range(STEPS):
            row = (group * STEPS + step) * ROWS + tl.arange(0, ROWS)
            scale = _row_scale(largest, scales, row, num_rows, block, INVERSE_LARGEST, SMALLEST)
            at, mask = tile_at(out, row, column, num_rows, out_stride, WIDTH)
            first = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
            second = tl.load(at + WIDTH, mask=mask, other=0.0, cache_modifier=".cg")
            at, mask = tile_at(codes, row, column, num_rows, 2 * WIDTH, WIDTH)
            tl.store(at, code_of(_folded(first, fold, column, WIDTH, FOLD), scale), mask=mask)
            tl.store(at + WIDTH, code_of(_folded(second, fold + WIDTH, column, WIDTH, FOLD), scale), mask=mask)

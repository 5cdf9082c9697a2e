"""Cross-entropy's Triton kernel, as torch custom operators. Imported only where Triton is installed.

A program takes one row: it reads it for the largest logit and the sum of the exponentials, and, where the gradient is
wanted, reads it again from its end, so that what was read last is still in the cache, and writes the gradient.
Each thread keeps a maximum and a sum of its own, and they are joined once at the end of the row: nothing waits inside
the loop. A row of 131,072 logits in 16 bits is 256 KiB, and the rows in flight fit the L2 cache of a large chip.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current
from tunesmith.units import ceil_div

# Neighbouring logits that one lane takes at once: 16 bytes of a 16-bit dtype.
_WIDTH = 8
_MOST_LANES = 2048
_LANES_PER_WARP = 64


@torch.library.custom_op("tunesmith::cross_entropy", mutates_args=())
def cross_entropy_operator(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """Losses, float32 [T]."""
    return _launch(logits, targets, ignored, 1.0, None, gradient=False)


@cross_entropy_operator.register_fake
def _cross_entropy_fake(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


@torch.library.custom_op("tunesmith::cross_entropy_and_grad_", mutates_args={"logits"})
def cross_entropy_and_grad_operator(
    logits: Tensor, targets: Tensor, ignored: int, factor: float, scale: Tensor | None
) -> Tensor:
    """Losses; the logits become the gradient of factor * scale * losses.sum(). scale: one element, None: 1."""
    return _launch(logits, targets, ignored, factor, scale, gradient=True)


@cross_entropy_and_grad_operator.register_fake
def _cross_entropy_and_grad_fake(
    logits: Tensor, targets: Tensor, ignored: int, factor: float, scale: Tensor | None
) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def launch_shape(vocab_size: int) -> tuple[int, int]:
    """Lanes of a program, each of 8 logits at a time, and its warps."""
    lanes = min(_MOST_LANES, triton.next_power_of_2(ceil_div(vocab_size, _WIDTH)))
    return lanes, max(1, lanes // _LANES_PER_WARP)


def _launch(
    logits: Tensor, targets: Tensor, ignored: int, factor: float, scale: Tensor | None, *, gradient: bool
) -> Tensor:
    num_rows, vocab_size = logits.shape
    losses = logits.new_empty(num_rows, dtype=torch.float32)
    if num_rows == 0:
        return losses
    # A copy of logits whose rows are not contiguous would lose the gradient.
    assert logits.stride(1) == 1 or vocab_size == 1
    lanes, warps = launch_shape(vocab_size)
    with current(logits.device):
        cross_entropy_kernel[(num_rows,)](
            logits,
            targets.contiguous(),
            losses if scale is None else scale,
            losses,
            logits.stride(0),
            vocab_size,
            factor,
            HAS_SCALE=scale is not None,
            GRADIENT=gradient,
            IGNORED=ignored,
            LANES=lanes,
            WIDTH=_WIDTH,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return losses


@jit
def _take_in(largest, total, x):
    # Each lane's sum of exp(x - largest), where larger values may follow.
    new = tl.maximum(largest, tl.max(x, 1))
    return new, total * tl.exp(largest - new) + tl.sum(tl.exp(x - new[:, None]), 1)


@jit
def _gradient(x, is_target, row_largest, inverse, unit, counted):
    probability = tl.exp(x - row_largest) * inverse
    return tl.where(counted, tl.where(is_target, probability - 1.0, probability) * unit, 0.0)


@jit
def cross_entropy_kernel(
    logits,
    targets,
    scale,
    losses,
    row_stride,
    vocab_size,
    factor,
    HAS_SCALE: tl.constexpr,
    GRADIENT: tl.constexpr,
    IGNORED: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    STEP: tl.constexpr = LANES * WIDTH
    row_number = tl.program_id(0)
    row = logits + row_number.to(tl.int64) * row_stride
    target = tl.load(targets + row_number)
    counted = target != IGNORED
    possible = (target >= 0) & (target < vocab_size)
    word = tl.where(possible, target, -1).to(tl.int32)
    # Read here, before the sums' barriers: further down another warp may have written the gradient over it.
    at_target = tl.load(row + word, mask=possible, other=float("nan")).to(tl.float32)
    tile = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    # Whole tiles go without a mask, which would cut wide loads up where the vocabulary's size is odd.
    whole = vocab_size // STEP * STEP
    tail = whole + tile
    in_tail = tail < vocab_size

    # Finite, so that a lane without a logit, or with -inf alone, counts for zero and not for NaN.
    largest = tl.full([LANES], -3.0e38, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    for start in range(0, whole, STEP):
        x = tl.load(row + start + tile).to(tl.float32)
        largest, total = _take_in(largest, total, x)
    if whole < vocab_size:
        x = tl.load(row + tail, mask=in_tail, other=-float("inf")).to(tl.float32)
        largest, total = _take_in(largest, total, x)
    row_largest = tl.max(largest, 0)
    row_total = tl.sum(total * tl.exp(largest - row_largest), 0)
    loss = row_largest + tl.log(row_total) - at_target
    tl.store(losses + row_number, tl.where(counted, loss, 0.0))

    if GRADIENT:
        unit = factor
        if HAS_SCALE:
            unit = factor * tl.load(scale).to(tl.float32)
        inverse = 1.0 / row_total
        if whole < vocab_size:
            x = tl.load(row + tail, mask=in_tail, other=-float("inf")).to(tl.float32)
            gradient = _gradient(x, tail == word, row_largest, inverse, unit, counted)
            tl.store(row + tail, gradient.to(logits.dtype.element_ty), mask=in_tail)
        for done in range(0, whole, STEP):
            column = whole - STEP - done + tile
            x = tl.load(row + column).to(tl.float32)
            gradient = _gradient(x, column == word, row_largest, inverse, unit, counted)
            tl.store(row + column, gradient.to(logits.dtype.element_ty))

"""The Triton kernel of an 8-bit AdamW update, as a torch custom operator. Imported only where Triton is installed."""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.adam8bit_moments import BLOCK, AdamSettings, Moments, codebook_on, midpoints_on
from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current
from tunesmith.units import ceil_div

# Blocks of 256 of one program.
BLOCKS = 4
_MUTATED = ("parameter", "mean_codes", "mean_absmax", "square_codes", "square_absmax")


def update_kernel(
    parameter: Tensor, grad: Tensor, moments: Moments, settings: AdamSettings, divisor: Tensor, stopped: Tensor
) -> None:
    """`kernels.adam8bit.update` in one pass."""
    update_operator(
        parameter,
        grad,
        moments.mean_codes,
        moments.mean_absmax,
        moments.square_codes,
        moments.square_absmax,
        divisor,
        stopped,
        settings.learning_rate,
        1 - settings.learning_rate * settings.weight_decay,
        list(settings.betas),
        list(settings.corrections),
        settings.eps,
    )


@torch.library.custom_op("tunesmith::adam8bit_update", mutates_args=_MUTATED)
def update_operator(
    parameter: Tensor,
    grad: Tensor,
    mean_codes: Tensor,
    mean_absmax: Tensor,
    square_codes: Tensor,
    square_absmax: Tensor,
    divisor: Tensor,
    stopped: Tensor,
    learning_rate: float,
    decay: float,
    betas: list[float],
    corrections: list[float],
    eps: float,
) -> None:
    """Flat, contiguous tensors; decay: what the weight is multiplied by before the step."""
    device, count = parameter.device, parameter.numel()
    with current(device):
        _update_kernel[(ceil_div(count, BLOCKS * BLOCK),)](
            parameter,
            grad,
            mean_codes,
            mean_absmax,
            square_codes,
            square_absmax,
            codebook_on(True, device),
            codebook_on(False, device),
            midpoints_on(True, device),
            midpoints_on(False, device),
            divisor,
            stopped,
            count,
            learning_rate,
            decay,
            betas[0],
            betas[1],
            1 - betas[0],
            1 - betas[1],
            corrections[0],
            corrections[1],
            eps,
            BLOCK=BLOCK,
            BLOCKS=BLOCKS,
            enable_fp_fusion=True,
        )


@update_operator.register_fake
def _update_fake(
    parameter: Tensor,
    grad: Tensor,
    mean_codes: Tensor,
    mean_absmax: Tensor,
    square_codes: Tensor,
    square_absmax: Tensor,
    divisor: Tensor,
    stopped: Tensor,
    learning_rate: float,
    decay: float,
    betas: list[float],
    corrections: list[float],
    eps: float,
) -> None:
    return None


@jit
def _nearest_code(scaled, middles, SIGNED: tl.constexpr):
    """How many of the 255 midpoints lie below a value in [-1, 1].

    The code's decade and part follow from the magnitude but for the neighbours at a decade's ends (a code's cell ends
    between two codes, not between two parts), so the two midpoints around the guess decide: two loads, not eight.
    """
    magnitude = tl.abs(scaled)
    scale = tl.full(scaled.shape, 1e6, tl.float32)
    parts = tl.full(scaled.shape, 1.0 if SIGNED else 2.0, tl.float32)
    first = tl.full(scaled.shape, 0, tl.int32)  # codes of the decades below
    threshold = 1e-6
    for _ in tl.static_range(6):
        above = magnitude >= threshold
        first += tl.where(above, parts.to(tl.int32), 0)
        scale = tl.where(above, scale * 0.1, scale)
        parts = tl.where(above, parts * 2.0, parts)
        threshold = threshold * 10.0
    part = tl.maximum((magnitude * scale - 0.1) * (parts * 1.1111111), 0.0).to(tl.int32)
    rank = first + part + 1  # zero has rank 0, the largest value 1 a rank of its own
    guess = tl.where(scaled < 0.0, 127 - rank, 127 + rank) if SIGNED else rank
    guess = tl.minimum(tl.maximum(guess, 0), 255)
    upper = tl.load(middles + tl.minimum(guess, 254))
    lower = tl.load(middles + tl.maximum(guess - 1, 0))
    raised = (guess < 255) & (upper < scaled)
    lowered = (guess > 0) & (lower >= scaled)
    return tl.where(raised, guess + 1, tl.where(lowered, guess - 1, guess))


@jit
def _update_kernel(
    parameter,
    grad,
    mean_codes,
    mean_absmax,
    square_codes,
    square_absmax,
    mean_book,
    square_book,
    mean_middles,
    square_middles,
    divisor,
    stopped,
    count,
    learning_rate,
    decay,
    beta1,
    beta2,
    rest1,
    rest2,
    correction1,
    correction2,
    eps,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    # One row of the tile is one block of 256. Where the guard has stopped nothing is read or written.
    limit = tl.where(tl.load(stopped) == 0.0, count, 0)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    index = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = index < limit
    block_mask = block * BLOCK < limit
    gradient = tl.load(grad + index, mask=mask, other=0.0).to(tl.float32) / tl.load(divisor)
    mean_scale = tl.load(mean_absmax + block, mask=block_mask, other=0.0)
    square_scale = tl.load(square_absmax + block, mask=block_mask, other=0.0)
    mean_code = tl.load(mean_codes + index, mask=mask, other=0).to(tl.int32)
    square_code = tl.load(square_codes + index, mask=mask, other=0).to(tl.int32)
    mean = tl.load(mean_book + mean_code) * mean_scale[:, None]
    square = tl.load(square_book + square_code) * square_scale[:, None]

    mean = mean + rest1 * (gradient - mean)
    square = square * beta2 + rest2 * gradient * gradient
    mean = tl.where(mask, mean, 0.0)  # beyond the end nothing counts for a block's largest
    square = tl.where(mask, square, 0.0)
    step = mean / correction1 / (tl.sqrt(square / correction2) + eps)
    weight = tl.load(parameter + index, mask=mask, other=0.0).to(tl.float32) * decay - learning_rate * step
    tl.store(parameter + index, weight.to(parameter.dtype.element_ty), mask=mask)

    mean_scale = tl.max(tl.abs(mean), axis=1)
    square_scale = tl.max(square, axis=1)
    tiny = 1.1754943508222875e-38
    mean_code = _nearest_code(mean / tl.maximum(mean_scale, tiny)[:, None], mean_middles, True)
    square_code = _nearest_code(square / tl.maximum(square_scale, tiny)[:, None], square_middles, False)
    # Rounded to zero, it would leave eps alone to divide by.
    square_code = tl.where(square > 0.0, tl.maximum(square_code, 1), 0)
    tl.store(mean_codes + index, mean_code.to(tl.uint8), mask=mask)
    tl.store(square_codes + index, square_code.to(tl.uint8), mask=mask)
    tl.store(mean_absmax + block, mean_scale, mask=block_mask)
    tl.store(square_absmax + block, square_scale, mask=block_mask)

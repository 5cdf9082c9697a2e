"""The Triton kernel of an AdamW update, as a torch custom operator. Imported only where Triton is installed."""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current
from tunesmith.units import ceil_div

# Values of one program: of 2-byte values, two loads of 16 bytes a thread from each of the four tensors, all in flight
# before the first is needed.
BLOCK = 2048
WARPS = 4


@torch.library.custom_op("tunesmith::adamw_update", mutates_args=("weights", "means", "squares"))
def update_operator(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    divisor: Tensor,
    stopped: Tensor,
    learning_rate: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
) -> None:
    """`kernels.adamw.update`: a launch for each weight. Contiguous tensors, all on one device."""
    beta1, beta2 = betas
    numbers = (learning_rate, 1 - learning_rate * weight_decay, 1 - beta1, beta2, 1 - beta2, eps)
    logarithms = (math.log(beta1) if beta1 else -math.inf, math.log(beta2) if beta2 else -math.inf)
    with current(weights[0].device):
        for weight, grad, mean, square, step in zip(weights, grads, means, squares, steps, strict=True):
            count = weight.numel()
            if count == 0:
                continue
            _update_kernel[(ceil_div(count, BLOCK),)](
                weight,
                grad,
                mean,
                square,
                step,
                divisor,
                stopped,
                count,
                *numbers,
                *logarithms,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )


@update_operator.register_fake
def _update_fake(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    divisor: Tensor,
    stopped: Tensor,
    learning_rate: float,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
) -> None:
    return None


@jit
def _correction(step, logarithm):
    """1 - beta^step = 1 - e^x, x = step ln(beta) < 0, to float32's precision: by its series where e^x is near 1."""
    x = step * logarithm
    near = tl.maximum(x, -0.5)
    series = 1.0
    for i in tl.static_range(9, 1, -1):  # (e^x - 1) / x = 1 + x/2 (1 + x/3 (1 + ...))
        series = 1.0 + near * (1.0 / i) * series
    return tl.where(x > -0.5, -near * series, 1.0 - tl.exp(x))


@jit
def _update_kernel(
    weights,
    grads,
    means,
    squares,
    step,
    divisor,
    stopped,
    count,
    learning_rate,
    decay,
    rest1,
    beta2,
    rest2,
    eps,
    logarithm1,
    logarithm2,
    BLOCK: tl.constexpr,
) -> None:
    # Where the guard has stopped nothing more is read or written.
    if tl.load(stopped) != 0.0:
        return
    number, scale = tl.load(step), tl.load(divisor)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    weight = tl.load(weights + index, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grads + index, mask=mask, other=0.0).to(tl.float32) / scale
    mean = tl.load(means + index, mask=mask, other=0.0).to(tl.float32)
    square = tl.load(squares + index, mask=mask, other=0.0).to(tl.float32)

    mean = mean + rest1 * (grad - mean)
    square = square * beta2 + rest2 * grad * grad
    denominator = tl.sqrt(square / _correction(number, logarithm2)) + eps
    weight = weight * decay - learning_rate * (mean / _correction(number, logarithm1) / denominator)
    tl.store(weights + index, weight.to(weights.dtype.element_ty), mask=mask)
    tl.store(means + index, mean.to(means.dtype.element_ty), mask=mask)
    tl.store(squares + index, square.to(squares.dtype.element_ty), mask=mask)

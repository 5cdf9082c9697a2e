"""One update of AdamW, in one pass over weight, gradient and moments. Source: arXiv 1711.05101, algorithm 2.

Weights, gradients and moments may each be of any floating dtype: all is computed in float32 and rounded once, when
stored. Gradients are read, never written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.kernels.nf4 import use_kernel

# What the Triton kernel reads and writes.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AdamWSettings:
    """The numbers of an update that the host knows."""

    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class Updated:
    """What is updated: for each weight its gradient, its two moments and its step, lists of one length.

    Tensors are contiguous, those of a weight of one shape. step: a float32 scalar on the weight's device, the number of
    this update for the weight, from 1 (0 where the guard has stopped the weight's first).
    """

    weights: Sequence[Tensor]
    grads: Sequence[Tensor]
    means: Sequence[Tensor]
    squares: Sequence[Tensor]
    steps: Sequence[Tensor]


def update(updated: Updated, settings: AdamWSettings, divisor: Tensor, stopped: Tensor) -> None:
    """Weights and moments after one update by gradient / `divisor`, in place; as they were where `stopped` is 1.

        m = m + (1 - beta1) (g - m)        v = beta2 v + (1 - beta2) g^2
        w = (1 - lr decay) w - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)

    Args:
        updated: all on one device.
        divisor, stopped: float32 scalars there. The kernel leaves them there; the reference reads `stopped`.
    """
    if not updated.weights:
        return
    if not use_kernel(updated.weights[0].device):
        update_reference(updated, settings, divisor, stopped)
        return
    update_by_kernel(updated, settings, divisor, stopped)


def update_by_kernel(updated: Updated, settings: AdamWSettings, divisor: Tensor, stopped: Tensor) -> None:
    """`update` in Triton: a launch for each weight, one operator for all."""
    from tunesmith.kernels.adamw_triton import update_operator

    update_operator(
        updated.weights,
        updated.grads,
        updated.means,
        updated.squares,
        updated.steps,
        divisor,
        stopped,
        settings.learning_rate,
        settings.betas,
        settings.eps,
        settings.weight_decay,
    )


def update_reference(updated: Updated, settings: AdamWSettings, divisor: Tensor, stopped: Tensor) -> None:
    """`update` in plain torch."""
    if bool(stopped):
        return
    lists = (updated.weights, updated.grads, updated.means, updated.squares, updated.steps)
    for weight, grad, mean, square, step in zip(*lists, strict=True):
        _update_one(weight, grad.float() / divisor, mean, square, step.double(), settings)


def _update_one(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: Tensor, settings: AdamWSettings
) -> None:
    beta1, beta2 = settings.betas
    wide_mean = mean.float().lerp(grad, 1 - beta1)
    wide_square = square.float().mul(beta2).addcmul_(grad, grad, value=1 - beta2)
    # Near the first step a correction is a small difference of numbers near 1: float64 until it is taken.
    correction1, correction2 = ((1 - beta**step).float() for beta in (beta1, beta2))
    denominator = (wide_square / correction2).sqrt_().add_(settings.eps)
    wide = weight.float().mul(1 - settings.learning_rate * settings.weight_decay)
    weight.copy_(wide.sub_((wide_mean / correction1).div_(denominator), alpha=settings.learning_rate))
    mean.copy_(wide_mean)
    square.copy_(wide_square)

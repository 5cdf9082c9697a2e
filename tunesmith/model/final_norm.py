"""The norm before the head, by the kernels of the written-out blocks: one pass forward, one backward.

Held for the backward pass are its input, which the last block's output is anyway, and one number a row; the eager form
holds two float32 copies of it, which for a long sequence are as much as a block's activations.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.autograd import Function

from tunesmith.kernels.rms_norm import rms_norm, rms_norm_backward
from tunesmith.model.layers import RMSNorm


def final_norm(norm: nn.Module, x_TD: Tensor) -> Tensor:
    """norm(x), written out where that is plain RMSNorm."""
    if type(norm) is not RMSNorm:
        return cast(Tensor, norm(x_TD))
    return cast(Tensor, _FinalNorm.apply(x_TD, norm.weight, norm.eps))


class _FinalNorm(Function):
    """See `kernels.rms_norm`."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y, rstd = rms_norm(x_TD, weight_D, eps)
        ctx.save_for_backward(x_TD, weight_D, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = rms_norm_backward(grads[0], x, weight, rstd, None, ctx.needs_input_grad[1])
        return dx, None if dweight is None else dweight.to(weight.dtype), None

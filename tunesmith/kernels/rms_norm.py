"""RMSNorm and its gradient with the statistics kept: scale, recompute, and the gradient of the stream in one pass.

Rows are the last dimension, of a packed [T, D] activation or of the heads [T, N, H] of a projection (a view whose
rows have their own strides, as a part of a fused projection is). Below D stands for H where rows are heads.
Source: arXiv 1910.07467, section 3; the gradient is derived from it:
with n = x * rstd and c = grad_y * weight, grad_x = rstd * (c - n * mean(c * n)), and grad_weight is the sum over the
rows of grad_y * n.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.kernels import cpu_train
from tunesmith.kernels.in_float32 import in_float32_on_cpu
from tunesmith.kernels.nf4 import use_kernel


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight, and the reciprocal root of every row.

    Computed in float32, rounded to x's dtype, then multiplied by the weight in that dtype.
    Args: x_TD: [T, D] or [T, N, D]; other than the last dimension, strides are free.
    Returns: y contiguous, of x's shape and dtype; rstd float32 [T] (or [T, N]).
    """
    if use_kernel(x_TD.device):
        from tunesmith.kernels.rms_norm_triton import rms_norm_operator

        return rms_norm_operator(x_TD, weight_D, eps)
    if cpu_train.takes(x_TD, weight_D) and x_TD.dim() > 1:
        return cpu_train.rms_norm(x_TD, weight_D, eps)
    if in_float32_on_cpu(x_TD, weight_D):
        rstd = x_TD.square().mean(-1).add_(eps).rsqrt_()
        return rms_norm_again(x_TD, weight_D, rstd), rstd
    return rms_norm_reference(x_TD, weight_D, eps)


def rms_norm_again(x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor) -> Tensor:
    """The same y as rms_norm's, bit for bit, from the rstd that it returned: one pass, no reduction."""
    if use_kernel(x_TD.device):
        from tunesmith.kernels.rms_norm_triton import rms_norm_again_operator

        return rms_norm_again_operator(x_TD, weight_D, rstd_T)
    if cpu_train.takes(x_TD, weight_D, rstd_T) and x_TD.dim() > 1:
        return cpu_train.rms_norm(x_TD, weight_D, 0.0, rstd_T)[0]
    if in_float32_on_cpu(x_TD, weight_D):
        return x_TD.mul(rstd_T[..., None]).mul_(weight_D).contiguous()
    return rms_norm_again_reference(x_TD, weight_D, rstd_T)


def rms_norm_backward(
    grad_y_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, add_TD: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and of the weight.

    Args: add_TD: what else flows into x (the gradient of the residual stream): added in float32, before the rounding.
    weight_grad: whether the weight's gradient is wanted.
    Returns: grad_x contiguous, of x's shape and dtype; grad_weight float32 [D] or None, summed in an order that is
    the same in every run on the same chip.
    """
    if cpu_train.takes(grad_y_TD, x_TD, weight_D, rstd_T, add_TD) and x_TD.dim() > 1:
        return cpu_train.rms_norm_backward(grad_y_TD, x_TD, weight_D, rstd_T, add_TD, weight_grad)
    if in_float32_on_cpu(grad_y_TD, x_TD, weight_D, add_TD):
        return _rms_norm_backward_in_place(grad_y_TD, x_TD, weight_D, rstd_T, add_TD, weight_grad)
    if not use_kernel(x_TD.device):
        return rms_norm_backward_reference(grad_y_TD, x_TD, weight_D, rstd_T, add_TD, weight_grad)
    from tunesmith.kernels.rms_norm_triton import rms_norm_backward_operator

    grad_x, grad_weight = rms_norm_backward_operator(grad_y_TD, x_TD, weight_D, rstd_T, add_TD, weight_grad)
    return grad_x, grad_weight if weight_grad else None


def rms_norm_reference(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rms_norm by plain torch: the truth that the kernel must equal but for the order of the sum."""
    rstd = torch.rsqrt(x_TD.float().square().mean(-1) + eps)
    return rms_norm_again_reference(x_TD, weight_D, rstd), rstd


def rms_norm_again_reference(x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor) -> Tensor:
    """rms_norm_again by plain torch."""
    scaled = (x_TD.float() * rstd_T[..., None]).to(x_TD.dtype)
    return (scaled * weight_D.to(x_TD.dtype)).contiguous()


def rms_norm_backward_reference(
    grad_y_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, add_TD: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """rms_norm_backward by plain torch. The weight's gradient takes n as the forward pass rounded it."""
    grad_y, rstd = grad_y_TD.float(), rstd_T[..., None]
    normal = x_TD.float() * rstd
    through = grad_y * weight_D.to(x_TD.dtype).float()
    grad_x = (through - normal * (through * normal).mean(-1, keepdim=True)) * rstd
    if add_TD is not None:
        grad_x = grad_x + add_TD.float()
    grad_weight = None
    if weight_grad:
        grad_weight = (grad_y * normal.to(x_TD.dtype).float()).flatten(0, -2).sum(0)
    return grad_x.to(x_TD.dtype).contiguous(), grad_weight


def _rms_norm_backward_in_place(
    grad_y_TD: Tensor, x_TD: Tensor, weight_D: Tensor, rstd_T: Tensor, add_TD: Tensor | None, weight_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """rms_norm_backward as rstd * c - x * (rstd^3 * mean(c * x)), in one tensor."""
    rstd = rstd_T[..., None]
    grad_weight = (grad_y_TD * x_TD).mul_(rstd).flatten(0, -2).sum(0) if weight_grad else None
    grad_x = grad_y_TD.contiguous() * weight_D
    along_x = torch.linalg.vecdot(grad_x, x_TD)[..., None].mul_(rstd).mul_(rstd).mul_(rstd).div_(-x_TD.shape[-1])
    grad_x.mul_(rstd).addcmul_(x_TD, along_x)
    return grad_x if add_TD is None else grad_x.add_(add_TD), grad_weight

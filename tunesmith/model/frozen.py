"""The product with a weight that is not trained: nothing is saved for its backward pass."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class FrozenLinear(Protocol):
    """A linear that knows both of its products; each takes and gives [T, .]."""

    bias: Any

    def product(self, x_TD: Tensor) -> Tensor:
        """y_TF = x @ weight.T + bias, in the dtype of x."""

    def input_grad(self, g_TF: Tensor) -> Tensor:
        """dx_TD = g @ weight, in the dtype of g."""


class FrozenProduct(torch.autograd.Function):
    """`linear.product(x)` whose gradient to x is `linear.input_grad`; the weight gets none, a trained bias does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        return linear.product(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        bias = ctx.linear.bias
        grad_x = ctx.linear.input_grad(grad) if ctx.needs_input_grad[0] else None
        grad_bias = grad.flatten(0, -2).sum(0).to(bias.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None

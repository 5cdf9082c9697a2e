"""Linears that are trained with products in fp8: the weight stays what it is, a bfloat16 or float32 master.

    y  = x W.T      rows of x, rows of W          scales of both factor out of the sum over D
    dx = g W        rows of g, columns of W       ... over F
    dW = g.T x      columns of g, columns of x    ... over T

All six operands are quantised from the wide tensors as they are used; nothing in fp8 is held between the passes. The
gradients pass through the roundings as if there were none.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.kernels.fp8 import fp8_product, quantize_rows_fp8
from tunesmith.kernels.fp8_columns import quantize_columns_fp8
from tunesmith.model.fp8 import inner_blocks
from tunesmith.model.layers import Linear


class TrainedFp8Linear(Linear):
    """A `Linear` whose products run in fp8; parameters and names are those of the linear it replaces.

    `compute` "weights" gives the products of the weight itself back: what checks of exactness need.
    `fp8_weight_grad`: whether dW is in fp8 too; else it is the product of g and x as they are.
    """

    def __init__(self, linear: Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.parts = dict(linear.parts)
        self.weight, self.bias = linear.weight, linear.bias
        self.compute: Literal["weights", "fp8"] = "fp8"
        self.fp8_weight_grad = True

    def product(self, x_TD: Tensor) -> Tensor:
        """y_TF = x @ weight.T + bias in the dtype of x, without gradients."""
        if self.compute == "weights":
            return super().product(x_TD)
        codes, scale = quantize_rows_fp8(self.weight.detach())
        y_TF = fp8_product(*quantize_rows_fp8(x_TD.flatten(0, -2)), codes, scale.view(-1), self.bias, x_TD.dtype)
        return y_TF.view(*x_TD.shape[:-1], self.out_features)

    def input_grad(self, g_TF: Tensor) -> Tensor:
        """dx_TD = g @ weight in the dtype of g."""
        if self.compute == "weights":
            return super().input_grad(g_TF)
        codes, scale = quantize_columns_fp8(self.weight.detach())
        g = quantize_rows_fp8(_widened(g_TF.flatten(0, -2), codes.shape[1]))
        dx_TD = fp8_product(*g, codes, scale.view(-1), None, g_TF.dtype, backward=True)
        return dx_TD.view(*g_TF.shape[:-1], self.in_features)

    def weight_grad(self, g_TF: Tensor, x_TD: Tensor) -> Tensor:
        """dW_FD = g.T @ x in the dtype of g."""
        if self.compute == "weights" or not self.fp8_weight_grad:
            return super().weight_grad(g_TF, x_TD)
        (g_codes, g_scale), (x_codes, x_scale) = quantize_columns_fp8(g_TF), quantize_columns_fp8(x_TD)
        return fp8_product(g_codes, g_scale, x_codes, x_scale.view(-1), None, g_TF.dtype, backward=True)

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.compute == "weights":
            return super().forward(x_TD)
        return TrainedProduct.apply(x_TD, self.weight, self.bias, self)


class TrainedProduct(torch.autograd.Function):
    """`linear.product(x)` with the gradients of `linear.input_grad` and `linear.weight_grad`."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None, linear: Linear) -> Tensor:
        ctx.save_for_backward(x_TD if ctx.needs_input_grad[1] else None)
        ctx.linear = linear
        return linear.product(x_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (g,) = grads
        (x,) = ctx.saved_tensors
        linear: Linear = ctx.linear
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        rows = g.flatten(0, -2)
        dx = linear.input_grad(g) if wants_x else None
        dw = linear.weight_grad(rows, x.flatten(0, -2)).to(linear.weight.dtype) if wants_weight else None
        db = None
        if wants_bias and linear.bias is not None:
            db = rows.sum(0, dtype=torch.float32).to(linear.bias.dtype)
        return dx, dw, db, None


def train_in_fp8(blocks: nn.ModuleList) -> int:
    """Put a `TrainedFp8Linear` in place of every linear of the inner blocks but routers; returns how many.

    The first and the last block stay as they are, see `fp8.inner_blocks`.
    """
    count = 0
    for parent in [module for block in inner_blocks(blocks) for module in block.modules()]:
        for name, child in list(parent.named_children()):
            if type(child) is Linear and name != "router":
                setattr(parent, name, TrainedFp8Linear(child))
                count += 1
    return count


def _widened(g_TF: Tensor, width: int) -> Tensor:
    """g with zeros up to the width that the weight's columns were padded to."""
    return g_TF if g_TF.shape[1] == width else F.pad(g_TF, (0, width - g_TF.shape[1]))

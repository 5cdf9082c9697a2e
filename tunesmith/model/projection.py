"""A linear's products written out: forward, and backward without autograd, for whatever stands in a linear's place.

The backward pass of a frozen weight never computes the weight's gradient; the projections of a fused linear share
their input, which is given back to the backward pass once; adapters are skinny products beside the base's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.kernels.in_float32 import in_float32_on_cpu
from tunesmith.model.fp8 import Fp8Linear
from tunesmith.model.layers import Linear
from tunesmith.model.lora import AdaptedLinear
from tunesmith.model.low_rank import LowRank
from tunesmith.model.quant import NF4Linear

Base = Linear | NF4Linear | Fp8Linear


@dataclass
class Projection:
    """One linear of a block and, where it is adapted, its adapters as two matrices."""

    base: Base
    low_rank: LowRank | None = None

    @property
    def trained(self) -> list[Tensor]:
        """The parameters that get a gradient, in the order of `backward`'s."""
        if self.low_rank is not None:
            return list(self.low_rank.masters)
        own = [self.base.weight, self.base.bias] if isinstance(self.base, Linear) else [self.base.bias]
        return [tensor for tensor in own if isinstance(tensor, nn.Parameter) and tensor.requires_grad]

    def wide(self, x_T: Tensor) -> Tensor | None:
        """The adapters' up_FR, where there are adapters whose product is not in `base`'s for the tokens of `x_T`."""
        return None if self.low_rank is None or self.merges(x_T) else self.low_rank.up_FR

    def narrow(self, x_T: Tensor) -> Tensor | None:
        """The adapters' down_RD, where there are adapters whose product is not in `base`'s for the tokens of `x_T`."""
        return None if self.low_rank is None or self.merges(x_T) else self.low_rank.down_RD

    def merges(self, x_T: Tensor) -> bool:
        """Whether, for these tokens (a row each), the adapters are added to the weight before the product.

        In float32 on a CPU that is the same sum but for the order, and where there are more tokens than the weight has
        rows and columns the cheaper one: a weight is smaller than the activations it takes and makes.
        """
        if self.low_rank is None or type(self.base) is not Linear or not in_float32_on_cpu(x_T, self.base.weight):
            return False
        return x_T.shape[0] >= self.base.in_features + self.base.out_features

    @property
    def needs_input(self) -> bool:
        """Whether the backward pass asks for the input again."""
        return self.low_rank is not None or (isinstance(self.base, Linear) and self.base.weight.requires_grad)

    def forward(self, x_TD: Tensor, residual_TF: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """y_TF = residual + x W.T + bias + (x down.T) up.T, and the adapters' inner activation [T, R]."""
        y, low = self.forward_apart(x_TD, residual_TF)
        up = self.wide(x_TD)
        if up is not None and low is not None:
            y.addmm_(low, up.t())
        return y, low

    def forward_apart(self, x_TD: Tensor, residual_TF: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """`forward` with the product by `wide` left to the caller: residual + x W.T + bias, and x down.T [T, R]."""
        y = self._base_product(x_TD, residual_TF)
        return y, None if self.low_rank is None else x_TD @ self.low_rank.down_RD.t()

    def _base_product(self, x_TD: Tensor, residual_TF: Tensor | None) -> Tensor:
        if self.merges(x_TD):
            return self._merged_product(x_TD, residual_TF)
        if residual_TF is None:
            return self.base.product(x_TD)
        if type(self.base) is Linear and self.base.bias is None:
            return torch.addmm(residual_TF, x_TD, self.base.weight.to(x_TD.dtype).t())
        return self.base.product(x_TD).add_(residual_TF)

    def _merged_product(self, x_TD: Tensor, residual_TF: Tensor | None) -> Tensor:
        weight, bias = self._merged_weight(), self.base.bias
        if residual_TF is None:
            return F.linear(x_TD, weight, None if bias is None else bias.to(x_TD.dtype))
        y = torch.addmm(residual_TF, x_TD, weight.t())
        return y if bias is None else y.add_(bias)

    def _merged_weight(self) -> Tensor:
        assert self.low_rank is not None and isinstance(self.base, Linear)
        return self.low_rank.added_to(self.base.weight.detach())

    def input_grad(self, g_TF: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradients of x [T, D] and of the adapters' inner activation [T, R]."""
        dx, dlow = self.input_grad_apart(g_TF)
        down = self.narrow(g_TF)
        if down is not None and dlow is not None:
            dx.addmm_(dlow, down)
        return dx, dlow

    def input_grad_apart(self, g_TF: Tensor) -> tuple[Tensor, Tensor | None]:
        """`input_grad` with the product by `narrow` left to the caller: g W, and g up [T, R]."""
        dx = g_TF @ self._merged_weight() if self.merges(g_TF) else self.base.input_grad(g_TF)
        return dx, None if self.low_rank is None else self.low_rank.inner_grad(g_TF)

    def parameter_grads(
        self, g_TF: Tensor, x_TD: Tensor | None, low_TR: Tensor | None, dlow_TR: Tensor | None = None
    ) -> list[Tensor]:
        """The gradients of `trained`.

        Args: x_TD: the input, where `needs_input`. low_TR: what `forward` returned. dlow_TR: what `input_grad`
        returned, where that was called.
        """
        if self.low_rank is None:
            return self._own_grads(g_TF, x_TD)
        assert x_TD is not None and low_TR is not None
        dlow = self.low_rank.inner_grad(g_TF) if dlow_TR is None else dlow_TR
        if not g_TF.is_cuda:
            return self.low_rank.grads_by_part(g_TF, x_TD, low_TR, dlow)
        grad_up, grad_down = wide_product(g_TF.t(), low_TR), wide_product(dlow.t(), x_TD)
        return self.low_rank.master_grads(grad_down, grad_up)

    def _own_grads(self, g_TF: Tensor, x_TD: Tensor | None) -> list[Tensor]:
        grads = []
        for parameter in self.trained:
            if parameter is self.base.bias:
                grads.append(g_TF.sum(0, dtype=torch.float32).to(parameter.dtype))
            else:
                assert x_TD is not None and isinstance(self.base, Linear)
                grads.append(self.base.weight_grad(g_TF, x_TD).to(parameter.dtype))
        return grads


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, in float32 where the device has that: gradients of float32 masters are not rounded on the way."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


def projection_of(linear: nn.Module, dtype: torch.dtype) -> Projection | None:
    """The written-out form of a linear; None where its passes are autograd's: DoRA, dropout, a foreign linear."""
    if isinstance(linear, Linear | NF4Linear | Fp8Linear):
        return Projection(linear)
    if not isinstance(linear, AdaptedLinear) or linear.is_dora or linear.dropout:
        return None
    if not isinstance(linear.base, Linear | NF4Linear | Fp8Linear):
        return None
    return Projection(linear.base, LowRank(linear, dtype))

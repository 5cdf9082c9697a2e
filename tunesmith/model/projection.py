"""A linear's products written out: forward, and backward without autograd, for whatever stands in a linear's place.

The backward pass of a frozen weight never computes the weight's gradient; the projections of a fused linear share
their input, which is given back to the backward pass once; adapters are skinny products beside the base's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.kernels import cpu_train
from tunesmith.kernels.dropout import Noise, add_dropout_, dropout
from tunesmith.kernels.in_float32 import in_float32_on_cpu
from tunesmith.model.fp8 import Fp8Linear
from tunesmith.model.layers import Linear
from tunesmith.model.low_rank import LowRank, wide_product
from tunesmith.model.quant import NF4Linear
from tunesmith.model.stream import WHOLE, Stream

Base = Linear | NF4Linear | Fp8Linear


@dataclass
class Projection:
    """One linear of a block and, where it is adapted, its adapters as two matrices.

    dropout: of the adapters' input, drawn from the pass's noise (without noise none is dropped); site: tells its masks
    from those of other projections. stream: the block's: where processes share the linear, its tokens are gathered and
    summed by that.
    """

    base: Base
    low_rank: LowRank | None = None
    dropout: float = 0.0
    site: int = 0
    stream: Stream = WHOLE

    @property
    def trained(self) -> list[Tensor]:
        """The parameters that get a gradient, in the order of `parameter_grads`."""
        if self.low_rank is not None:
            return list(self.low_rank.masters)
        own = [self.base.weight, self.base.bias] if isinstance(self.base, Linear) else [self.base.bias]
        return [tensor for tensor in own if isinstance(tensor, nn.Parameter) and tensor.requires_grad]

    def merges(self, x_T: Tensor) -> bool:
        """Whether, for these tokens (a row each), the adapters are added to the weight before the product.

        In float32 on a CPU that is the same sum but for the order, and where there are more tokens than the weight has
        rows and columns the cheaper one: a weight is smaller than the activations it takes and makes.
        """
        if (
            self.low_rank is None
            or self.dropout
            or type(self.base) is not Linear
            or not in_float32_on_cpu(x_T, self.base.weight)
        ):
            return False
        return x_T.shape[0] >= self.base.in_features + self.base.out_features

    @property
    def needs_input(self) -> bool:
        """Whether the backward pass asks for the input again."""
        return self.low_rank is not None or (isinstance(self.base, Linear) and self.base.weight.requires_grad)

    def forward(
        self, x_TD: Tensor, residual_TF: Tensor | None = None, noise: Noise | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """y_TF = residual + x W.T + bias + (x down.T) up.T; what `parameter_grads` takes as low [T, R] and free."""
        y, low = self._base_and_low(x_TD, residual_TF, noise)
        left, right = self.beside(low)
        if left is not None and right is not None:
            y.addmm_(left, right.t())
        return y, low, None

    def forward_onto(
        self, x_TD: Tensor, stream_PD: Tensor, noise: Noise | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`forward` with the stream as the residual; where processes share the linear, their sum's own rows."""
        if self.stream is WHOLE:
            return self.forward(x_TD, stream_PD, noise)
        y, low, free = self.forward(x_TD, None, noise)
        return self.stream.scatter(y).add_(stream_PD), low, free

    def forward_apart(
        self, x_TD: Tensor, noise: Noise | None = None, low_TR: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """free, of which `output` makes x W.T + bias, the product with `beside` left to the caller; and low.

        low_TR: what this returned the first time, where it did.
        """
        if low_TR is None:
            return self._base_and_low(x_TD, None, noise)
        return self._base_product(x_TD, None), low_TR

    def output(self, free_TF: Tensor) -> Tensor:
        """The output that `forward_apart` leads to: free itself, or a tensor of its own."""
        return free_TF

    def beside(self, low_TR: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """low and up_FR whose product belongs to `output`, or two times None."""
        if self.low_rank is None or low_TR is None or self.merges(low_TR):
            return None, None
        return low_TR, self.low_rank.up_FR

    def input_grad(self, g_TF: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor | None]:
        """The gradients of x [T, D] and of the adapters' inner activation [T, R]."""
        dx, dlow = self.input_grad_apart(g_TF, noise)
        left, right = self.beside_grad(dlow, noise)
        if left is not None and right is not None:
            dx.addmm_(left, right)
        return dx, dlow

    def input_grad_apart(self, g_TF: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor | None]:
        """`input_grad` with the product of `beside_grad` left to the caller: g W, and g up [T, R]."""
        if self.merges(g_TF):
            return self._merged_grad(g_TF)
        dx = self.base.input_grad(g_TF)
        if self.low_rank is None:
            return dx, None
        dlow = self.low_rank.inner_grad(g_TF)
        if noise is not None and self.dropout:
            add_dropout_(dx, dlow @ self.low_rank.down_RD, noise, self.site, self.dropout)
        return dx, dlow

    def beside_grad(self, dlow_TR: Tensor | None, noise: Noise | None) -> tuple[Tensor | None, Tensor | None]:
        """dlow and down_RD whose product belongs to the input's gradient, or two times None: it is there already."""
        if self.low_rank is None or dlow_TR is None or (noise is not None and self.dropout) or self.merges(dlow_TR):
            return None, None
        return dlow_TR, self.low_rank.down_RD

    def parameter_grads(
        self,
        g_TF: Tensor,
        x_TD: Tensor | None,
        held: tuple[Tensor | None, Tensor | None, Tensor | None],
        noise: Noise | None = None,
    ) -> list[Tensor]:
        """The gradients of `trained`.

        Args: x_TD: the input, where `needs_input`. held: low, what `input_grad` returned beside dx (None where that
        was not called), and free.
        """
        low, dlow, _ = held
        if self.low_rank is None:
            return self._own_grads(g_TF, x_TD)
        assert x_TD is not None and low is not None
        dlow = self.low_rank.inner_grad(g_TF) if dlow is None else dlow
        if not g_TF.is_cuda:
            return self.low_rank.grads_by_part(g_TF, self._dropped(x_TD, noise), low, dlow)
        grad_up, grad_down = wide_product(g_TF.t(), low), wide_product(dlow.t(), self._dropped(x_TD, noise))
        return self.low_rank.master_grads(grad_down, grad_up)

    def _base_product(self, x_TD: Tensor, residual_TF: Tensor | None) -> Tensor:
        if self.merges(x_TD):
            return self._merged_product(x_TD, residual_TF)
        if residual_TF is None:
            return self.base.product(x_TD)
        if type(self.base) is Linear and self.base.bias is None:
            return torch.addmm(residual_TF, x_TD, self.base.weight.to(x_TD.dtype).t())
        return self.base.product(x_TD).add_(residual_TF)

    def _base_and_low(
        self, x_TD: Tensor, residual_TF: Tensor | None, noise: Noise | None
    ) -> tuple[Tensor, Tensor | None]:
        """What `_base_product` and `_low` return: by one product where our own takes both."""
        if self.merges(x_TD):
            adapted, bias = self._adapted(), self.base.bias
            if cpu_train.takes_product(x_TD, adapted.weight_FD, residual_TF, bias):
                low = x_TD.new_empty(len(x_TD), adapted.rank)
                y = cpu_train.product(x_TD, adapted, flat=False, residual=residual_TF, bias=bias, low=low)
                return y, low
        return self._base_product(x_TD, residual_TF), self._low(x_TD, noise)

    def _merged_product(self, x_TD: Tensor, residual_TF: Tensor | None) -> Tensor:
        adapted, bias = self._adapted(), self.base.bias
        if cpu_train.takes_product(x_TD, adapted.weight_FD, residual_TF, bias):
            return cpu_train.product(x_TD, adapted, flat=False, residual=residual_TF, bias=bias)
        weight = self._merged_weight()
        if residual_TF is None:
            return F.linear(x_TD, weight, None if bias is None else bias.to(x_TD.dtype))
        y = torch.addmm(residual_TF, x_TD, weight.t())
        return y if bias is None else y.add_(bias)

    def _merged_grad(self, g_TF: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of x and of the adapters' inner activation, where the adapters are added to the weight."""
        adapted = self._adapted()
        if cpu_train.takes_product(g_TF, adapted.weight_FD):
            dlow = g_TF.new_empty(len(g_TF), adapted.rank)
            return cpu_train.product(g_TF, adapted, flat=True, low=dlow), dlow
        assert self.low_rank is not None
        return g_TF @ self._merged_weight(), self.low_rank.inner_grad(g_TF)

    def _adapted(self) -> cpu_train.Adapted:
        assert self.low_rank is not None and isinstance(self.base, Linear)
        low_rank = self.low_rank
        return cpu_train.Adapted(self.base.weight.detach(), low_rank.up_FR, low_rank.down_RD, low_rank.blocks)

    def _merged_weight(self) -> Tensor:
        assert self.low_rank is not None and isinstance(self.base, Linear)
        return self.low_rank.added_to(self.base.weight.detach())

    def _low(self, x_TD: Tensor, noise: Noise | None) -> Tensor | None:
        return None if self.low_rank is None else self._dropped(x_TD, noise) @ self.low_rank.down_RD.t()

    def _dropped(self, x_TD: Tensor, noise: Noise | None) -> Tensor:
        return x_TD if noise is None or not self.dropout else dropout(x_TD, noise, self.site, self.dropout)

    def _own_grads(self, g_TF: Tensor, x_TD: Tensor | None) -> list[Tensor]:
        grads = []
        for parameter in self.trained:
            if parameter is self.base.bias:
                grads.append(g_TF.sum(0, dtype=torch.float32).to(parameter.dtype))
            else:
                assert x_TD is not None and isinstance(self.base, Linear)
                grads.append(self.base.weight_grad(g_TF, x_TD).to(parameter.dtype))
        return grads

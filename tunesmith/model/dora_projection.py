"""DoRA's products written out.

    free = W x + up (down x)         y = ratio * free + bias         ratio [F] constant but for the magnitude in it

Held for the backward pass is free, of which y is made again in one pass where it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tunesmith.kernels.dropout import Noise
from tunesmith.model.layers import Linear
from tunesmith.model.low_rank import wide_product
from tunesmith.model.projection import Projection
from tunesmith.model.row_scale import RowScale


@dataclass
class DoraProjection(Projection):
    """A frozen linear with adapters and a scale for each row. Knows no dropout."""

    rows: RowScale = field(kw_only=True)

    @property
    def trained(self) -> list[Tensor]:
        """The masters, then the magnitudes."""
        return [*super().trained, *self.rows.magnitudes]

    def forward(
        self, x_TD: Tensor, residual_TF: Tensor | None = None, noise: Noise | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """residual + output, low, and free."""
        free, low = self.forward_apart(x_TD)
        if residual_TF is None:
            return self.output(free), low, free
        y = torch.addcmul(residual_TF, free, self.rows.ratio_F)
        return y if self.base.bias is None else y.add_(self.base.bias), low, free

    def forward_apart(
        self, x_TD: Tensor, noise: Noise | None = None, low_TR: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """free with the adapters in it, and low."""
        assert self.low_rank is not None
        low = x_TD @ self.low_rank.down_RD.t() if low_TR is None else low_TR
        return self._free_product(x_TD).addmm_(low, self.low_rank.up_FR.t()), low

    def output(self, free_TF: Tensor) -> Tensor:
        """ratio * free + bias: always a tensor of its own."""
        if self.base.bias is None:
            return free_TF * self.rows.ratio_F
        return torch.addcmul(self.base.bias.to(free_TF.dtype), free_TF, self.rows.ratio_F)

    def merges(self, x_T: Tensor) -> bool:
        """Never: rows are scaled between the product and the bias."""
        return False

    def beside(self, low_TR: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Nothing: the adapters are in `output`."""
        return None, None

    def input_grad_apart(self, g_TF: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor | None]:
        """(ratio * g) W, and (ratio * g) up [T, R]."""
        return super().input_grad_apart(g_TF * self.rows.ratio_F)

    def parameter_grads(
        self,
        g_TF: Tensor,
        x_TD: Tensor | None,
        held: tuple[Tensor | None, Tensor | None, Tensor | None],
        noise: Noise | None = None,
    ) -> list[Tensor]:
        """The gradients of `trained`; held[2] is free."""
        low, dlow, free = held
        assert self.low_rank is not None and x_TD is not None and low is not None and free is not None
        ratio_F1 = self.rows.ratio_F[:, None]
        dlow = g_TF @ (ratio_F1 * self.low_rank.up_FR) if dlow is None else dlow
        grad_up, grad_down = wide_product(g_TF.t(), low) * ratio_F1, wide_product(dlow.t(), x_TD)
        return [*self.low_rank.master_grads(grad_down, grad_up), *self.rows.magnitude_grads(g_TF, free)]

    def _free_product(self, x_TD: Tensor) -> Tensor:
        """x W.T."""
        if type(self.base) is Linear:
            return x_TD @ self.base.weight.to(x_TD.dtype).t()
        free = self.base.product(x_TD)
        return free if self.base.bias is None else free.sub_(self.base.bias)

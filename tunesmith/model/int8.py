"""Linears whose weight is held in int8, with a scale for each output row: weight-only, or int8 times int8 (W8A8)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tunesmith.kernels.gemv import int8_product
from tunesmith.kernels.int8 import Int8Weight, dequantize_int8, int8_integer_product, quantize_int8
from tunesmith.model.held import HeldLinear


class Int8Linear(HeldLinear):
    """Projections of one input in int8, held fused.

    has_int8_products: W8A8, the activations are quantised by rows as they come, and sums are exact in int32; otherwise
    codes are widened and multiplied in the dtype of x.
    """

    codes: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        bias: bool,
        *,
        has_int8_products: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, parts, bias, dtype=dtype, device=device)
        self.has_int8_products = has_int8_products
        codes = torch.zeros(self.out_features, in_features, dtype=torch.int8, device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", torch.ones(self.out_features, device=device))

    @torch.no_grad()
    def load_part(self, part: str, weight_FD: Tensor | Int8Weight, bias_F: Tensor | None = None) -> None:
        """Quantise one projection's weight on the device it is on, or take over a quantised one; take over its bias."""
        held = weight_FD if isinstance(weight_FD, Int8Weight) else quantize_int8(weight_FD.to(self.dtype))
        self._check_shape(part, held.codes.shape)
        rows = self.rows(part)
        self.codes[rows].copy_(held.codes)
        self.scale[rows].copy_(held.scale)
        self._take_bias(part, bias_F)

    def part_held(self, part: str) -> Int8Weight:
        """One projection as it is held (views)."""
        rows = self.rows(part)
        return Int8Weight(self.codes[rows], self.scale[rows], self.dtype)

    def part_weight(self, part: str, dtype: torch.dtype | None = None) -> Tensor:
        """The dequantised weight_FD of one projection, in `dtype` (None: that of the weights quantised)."""
        rows = self.rows(part)
        return dequantize_int8(self.codes[rows], self.scale[rows], dtype or self.dtype)

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dequantised fused weight_FD."""
        return dequantize_int8(self.codes, self.scale, dtype or self.dtype)

    def product(self, x_TD: Tensor) -> Tensor:
        """y_TF = x @ weight.T + bias in the dtype of x, without gradients."""
        flat = x_TD.flatten(0, -2)
        if self.has_int8_products:
            y_TF = int8_integer_product(flat, self.codes, self.scale, self.bias)
        else:
            y_TF = int8_product(flat, self.codes, self.scale, self.bias)
        return y_TF.view(*x_TD.shape[:-1], self.out_features)

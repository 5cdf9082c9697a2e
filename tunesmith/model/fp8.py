"""Linears whose frozen weight is held in fp8 with a scale for each output row, put in place of those of the blocks.

Both products run in fp8: of the activations forward, and of the gradients backward, quantised row by row as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tunesmith.kernels.fp8 import (
    FP8,
    Fp8Weight,
    dequantize_rows,
    fp8_product,
    quantize_fp8_weight,
    quantize_rows_fp8,
    transpose_fp8,
)
from tunesmith.model.frozen import FrozenProduct
from tunesmith.model.layers import Linear, part_rows

_LEAST_BLOCKS = 3


class Fp8Linear(nn.Module):
    """Projections of one input in fp8, held fused: y_TF = x_TD @ weight_FD.T + bias_F in the dtype of x.

    The face of `Linear`; `dtype` is that of the weights that were quantised. The bias stays as it is.
    With `compute` "weights" the products are those of the dequantised weight in the dtype of x: what merging and
    checks of exactness need.
    """

    codes: Tensor
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        bias: bool,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.parts = dict(parts)
        self.out_features = sum(parts.values())
        self.dtype = dtype
        self.compute: Literal["weights", "fp8"] = "fp8"
        self.register_buffer("codes", torch.zeros(self.out_features, in_features, dtype=FP8, device=device))
        self.register_buffer("scale", torch.ones(self.out_features, device=device))
        self.shell: tuple[nn.Module] | None = None
        self.bias = nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device)) if bias else None

    def rows(self, part: str) -> slice:
        """The rows of the fused weight that belong to one projection."""
        return part_rows(self.parts, part)

    @torch.no_grad()
    def load_part(self, part: str, weight_FD: Tensor, bias_F: Tensor | None = None) -> None:
        """Quantise one projection's weight, converted to `dtype` before, on the device it is on; take over its bias."""
        expected, rows = (self.parts[part], self.in_features), self.rows(part)
        if weight_FD.shape != expected:
            raise ValueError(f"{part} must have shape {expected}, got {tuple(weight_FD.shape)}")
        quantised = quantize_fp8_weight(weight_FD.to(self.dtype))
        self.codes[rows].copy_(quantised.codes)
        self.scale[rows].copy_(quantised.scale)
        if bias_F is not None and self.bias is not None:
            self.bias[rows].copy_(bias_F)

    def part_fp8(self, part: str) -> Fp8Weight:
        """One projection as it is held (views)."""
        rows = self.rows(part)
        return Fp8Weight(self.codes[rows], self.scale[rows], (self.parts[part], self.in_features), self.dtype)

    def part_weight(self, part: str, dtype: torch.dtype | None = None) -> Tensor:
        """The dequantised weight_FD of one projection, in `dtype` (None: that of the weights quantised)."""
        rows = self.rows(part)
        return dequantize_rows(self.codes[rows], self.scale[rows], dtype or self.dtype)

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dequantised fused weight_FD."""
        return dequantize_rows(self.codes, self.scale, dtype or self.dtype)

    def keep_shell(self, module: nn.Module) -> None:
        """Remember the linear of another library that this one replaces, without its weight: merging gives it back."""
        cast(Any, module).weight = None
        self.shell = (module,)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight as held, scales included, the bias not."""
        return self.codes.nbytes + self.scale.nbytes

    def product(self, x_TD: Tensor) -> Tensor:
        """y_TF = x @ weight.T + bias in the dtype of x, without gradients: x quantised by rows, the product in fp8."""
        if self.compute == "weights":
            bias = None if self.bias is None else self.bias.to(x_TD.dtype)
            return nn.functional.linear(x_TD, self.weight(x_TD.dtype), bias)
        codes = quantize_rows_fp8(x_TD.flatten(0, -2))
        y_TF = fp8_product(*codes, self.codes, self.scale, self.bias, x_TD.dtype)
        return y_TF.view(*x_TD.shape[:-1], self.out_features)

    def input_grad(self, g_TF: Tensor) -> Tensor:
        """dx_TD = g @ weight in the dtype of g: the scales folded into g, which is quantised by rows."""
        if self.compute == "weights":
            return g_TF @ self.weight(g_TF.dtype)
        codes = quantize_rows_fp8(g_TF.flatten(0, -2), self.scale)
        dx_TD = fp8_product(*codes, transpose_fp8(self.codes), None, None, g_TF.dtype, backward=True)
        return dx_TD.view(*g_TF.shape[:-1], self.in_features)

    def forward(self, x_TD: Tensor) -> Tensor:
        return FrozenProduct.apply(x_TD, self.bias, self)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.parts}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        """Move as any module does, but never convert codes and scales: `.to(torch.bfloat16)` would spoil them."""
        held = {id(buffer) for buffer in self.buffers()}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            converted = id(tensor) in held and moved.dtype != tensor.dtype
            return tensor.to(moved.device) if converted else moved

        super()._apply(keep_dtype, recurse)
        return self


def quantise_linears_fp8(model: nn.Module) -> None:
    """Put an `Fp8Linear` in place of every linear of the blocks: attention, MLP, experts; not head, nor routers.

    On the meta device too; what has storage is quantised where it is, one linear at a time.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Linear and name not in ("head", "router"):
                setattr(parent, name, quantised_fp8(child))


def inner_blocks(blocks: Sequence[nn.Module] | nn.ModuleList) -> list[nn.Module]:
    """All blocks but the first and the last; of fewer than three, all.

    The stream is most sensitive to roundings next to the embedding and the head.
    """
    found = list(blocks)
    return found if len(found) < _LEAST_BLOCKS else found[1:-1]


def quantised_fp8(linear: Linear) -> Fp8Linear:
    """The fp8 form of a linear, on its device."""
    weight = linear.weight
    out = Fp8Linear(linear.in_features, linear.parts, linear.bias is not None, dtype=weight.dtype, device=weight.device)
    if not weight.is_meta:
        for part in linear.parts:
            bias = None if linear.bias is None else linear.bias[linear.rows(part)]
            out.load_part(part, linear.part_weight(part), bias)
    return out.requires_grad_(False)

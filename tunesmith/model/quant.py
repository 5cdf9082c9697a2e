"""Linears whose weight is held in NF4, put in place of the linears of the blocks.

The product dequantises the weight to the dtype of its input, or to fp8 for a product in fp8, and lets it go again; the
backward pass dequantises once more, so what is held for it is the codes, which are there anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.kernels.fp8 import Fp8Weight, fp8_product, quantize_rows_fp8
from tunesmith.kernels.nf4 import NF4Weight, dequantize_nf4, empty_nf4, plain_scales, quantize_nf4
from tunesmith.kernels.nf4_fp8 import nf4_row_scales, nf4_to_fp8
from tunesmith.model.fp8 import Fp8Linear, inner_blocks, quantise_linears_fp8, quantised_fp8
from tunesmith.model.frozen import FrozenProduct
from tunesmith.model.layers import Linear, part_rows
from tunesmith.model.trained_fp8 import TrainedFp8Linear

Compute = Literal["weights", "fp8"]
Quantisation = Literal["nf4", "nf4-double", "fp8", "fp8-inner"]
_STATE = ("codes", "scales", "scale_scales", "offset")


class NF4Linear(nn.Module):
    """Projections of one input in NF4, each with its own scales: y_TF = x_TD @ weight_FD.T + bias_F in the dtype of x.

    The face of `Linear`; `dtype` is that of the weights that were quantised. The bias stays as it is.
    `compute`: "weights" multiplies by the weights dequantised to the dtype of x; "fp8" by an fp8 form made of the codes
    for the one product, x quantised by rows.
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        bias: bool,
        *,
        double: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.parts = dict(parts)
        self.out_features = sum(parts.values())
        self.is_double = double
        self.dtype = dtype
        self.compute: Compute = "weights"
        self._row_scales: Tensor | None = None
        for part, rows in self.parts.items():
            self._hold(part, empty_nf4((rows, in_features), dtype, double, device))
        self.shell: tuple[nn.Module] | None = None
        self.bias = nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device)) if bias else None

    def rows(self, part: str) -> slice:
        """The rows of the fused weight that belong to one projection."""
        return part_rows(self.parts, part)

    @torch.no_grad()
    def load_part(self, part: str, weight_FD: Tensor, bias_F: Tensor | None = None) -> None:
        """Quantise one projection's weight, converted to `dtype` before, on the device it is on; take over its bias."""
        self.load_quantised(part, quantize_nf4(weight_FD.to(self.dtype), self.is_double), bias_F)

    @torch.no_grad()
    def load_quantised(self, part: str, weight: NF4Weight, bias_F: Tensor | None = None) -> None:
        """Take over one projection that is quantised already (and its bias) as it is."""
        expected = (self.parts[part], self.in_features)
        if weight.shape != expected:
            raise ValueError(f"{part} must have shape {expected}, got {weight.shape}")
        self._hold(part, weight)
        if bias_F is not None and self.bias is not None:
            self.bias[self.rows(part)].copy_(bias_F)

    @torch.no_grad()
    def hold_plain_scales(self) -> None:
        """Hold float32 scales where they are quantised: the same values, and a row's scales by themselves."""
        for part in self.parts:
            weight = self.part_nf4(part)
            self._hold(part, replace(weight, scales=plain_scales(weight), scale_scales=None, offset=None))

    def part_nf4(self, part: str) -> NF4Weight:
        """One projection as it is held."""
        state = [getattr(self, f"{part}_{name}") for name in _STATE]
        codes, scales, scale_scales, offset = state
        codes = codes.view(torch.uint8)  # held in another dtype of the same size where they are sharded
        return NF4Weight(codes, scales, (self.parts[part], self.in_features), self.dtype, scale_scales, offset)

    def part_weight(self, part: str, dtype: torch.dtype | None = None) -> Tensor:
        """The dequantised weight_FD of one projection, in `dtype` (None: that of the weights quantised)."""
        return dequantize_nf4(self.part_nf4(part), dtype)

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dequantised fused weight_FD."""
        return dequantize_nf4(self._all_parts(), dtype)

    def keep_shell(self, module: nn.Module) -> None:
        """Remember the linear of another library that this one replaces, without its weight: merging gives it back."""
        cast(Any, module).weight = None
        self.shell = (module,)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight as held, scales included, the bias not."""
        return sum(part.num_bytes for part in self._all_parts())

    def product(self, x_TD: Tensor) -> Tensor:
        """y_TF = x @ weight.T + bias in the dtype of x, without gradients."""
        if self.compute == "fp8":
            return self._product_fp8(x_TD)
        return F.linear(x_TD, self.weight(x_TD.dtype), None if self.bias is None else self.bias.to(x_TD.dtype))

    def input_grad(self, g_TF: Tensor) -> Tensor:
        """dx_TD = g @ weight in the dtype of g."""
        if self.compute == "fp8":
            return self._input_grad_fp8(g_TF)
        return g_TF @ self.weight(g_TF.dtype)

    def _product_fp8(self, x_TD: Tensor) -> Tensor:
        codes = quantize_rows_fp8(x_TD.flatten(0, -2))
        weight = nf4_to_fp8(self._all_parts(), scale_F=self.row_scales())
        y_TF = fp8_product(*codes, weight.codes, weight.scale, self.bias, x_TD.dtype)
        return y_TF.view(*x_TD.shape[:-1], self.out_features)

    def _input_grad_fp8(self, g_TF: Tensor) -> Tensor:
        codes = quantize_rows_fp8(g_TF.flatten(0, -2), self.row_scales())
        weight = nf4_to_fp8(self._all_parts(), transposed=True, scale_F=self.row_scales())
        dx_TD = fp8_product(*codes, weight.codes, None, None, g_TF.dtype, backward=True)
        return dx_TD.view(*g_TF.shape[:-1], self.in_features)

    def row_scales(self) -> Tensor:
        """The fp8 scale of every output row, float32 [F]: made at the first product in fp8, and kept."""
        if self._row_scales is None:
            self._row_scales = nf4_row_scales(self._all_parts())
        return self._row_scales

    def _all_parts(self) -> list[NF4Weight]:
        return [self.part_nf4(part) for part in self.parts]

    def forward(self, x_TD: Tensor) -> Tensor:
        return FrozenProduct.apply(x_TD, self.bias, self)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.parts}, double={self.is_double}"

    def _hold(self, part: str, weight: NF4Weight) -> None:
        self.is_double = weight.is_double
        self.dtype = weight.dtype
        self._row_scales = None
        for name in _STATE:
            self.register_buffer(f"{part}_{name}", getattr(weight, name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        """Move as any module does, but never convert the scales: `.to(torch.bfloat16)` would spoil them."""
        self._row_scales = None
        held = {id(buffer) for buffer in self.buffers()}

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            converted = id(tensor) in held and moved.dtype != tensor.dtype
            return tensor.to(moved.device) if converted else moved

        super()._apply(keep_dtype, recurse)
        return self


def quantise_linears(model: nn.Module, double: bool) -> None:
    """Put an `NF4Linear` in place of every linear of the blocks: attention, MLP, experts; not head, nor routers.

    On the meta device too; what has storage is quantised where it is, one linear at a time.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Linear and name not in ("head", "router"):
                setattr(parent, name, quantised(child, double))


def quantise_blocks(model: nn.Module, quantisation: Quantisation) -> None:
    """Hold every linear of the blocks in NF4 or fp8: `quantise_linears` or `quantise_linears_fp8`.

    "fp8-inner" leaves the first and the last block of a model's `blocks` as they are, see `fp8.inner_blocks`.
    """
    if quantisation == "fp8":
        quantise_linears_fp8(model)
    elif quantisation == "fp8-inner":
        for block in inner_blocks(cast(Any, model).blocks):
            quantise_linears_fp8(block)
    else:
        quantise_linears(model, quantisation == "nf4-double")


def quantised_as(linear: Linear, quantisation: Quantisation) -> NF4Linear | Fp8Linear:
    """The quantised form of a linear, on its device."""
    return quantised_fp8(linear) if quantisation.startswith("fp8") else quantised(linear, quantisation == "nf4-double")


def quantised(linear: Linear, double: bool) -> NF4Linear:
    """The NF4 form of a linear, on its device."""
    dtype, device = linear.weight.dtype, linear.weight.device
    out = NF4Linear(
        linear.in_features, linear.parts, linear.bias is not None, double=double, dtype=dtype, device=device
    )
    if not linear.weight.is_meta:
        for part in linear.parts:
            bias = None if linear.bias is None else linear.bias[linear.rows(part)]
            out.load_part(part, linear.part_weight(part), bias)
    return out.requires_grad_(False)


def dense_weight(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """The fused weight_FD of any linear in `dtype`: ours, NF4, fp8, torch's, or GPT-2's Conv1D of transformers."""
    if isinstance(linear, NF4Linear | Fp8Linear):
        return linear.weight(dtype)
    weight = linear.weight
    assert isinstance(weight, Tensor)
    if type(linear).__name__ == "Conv1D":
        weight = weight.t()
    return weight.to(dtype)


def fp8_weight(linear: NF4Linear | Fp8Linear) -> Fp8Weight:
    """The weight that a linear's products in fp8 are with."""
    if isinstance(linear, NF4Linear):
        return nf4_to_fp8([linear.part_nf4(part) for part in linear.parts], scale_F=linear.row_scales())
    shape = (linear.out_features, linear.in_features)
    return Fp8Weight(linear.codes, linear.scale, shape, linear.dtype)


def set_compute(model: nn.Module, compute: Compute) -> None:
    """What the products of a model's linears with an fp8 form are in: "weights" (dequantised, or as held), or "fp8"."""
    for child in model.modules():
        if isinstance(child, NF4Linear | Fp8Linear | TrainedFp8Linear):
            child.compute = compute
        if isinstance(child, NF4Linear) and compute == "fp8":
            child.row_scales()

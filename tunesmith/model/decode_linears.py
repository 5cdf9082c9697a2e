"""A model's linears in the forms that answer fastest: the same weights, other kernels where there are few tokens.

What is held does not change, so this is done after loading, and for any model whose linears are ours.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.kernels.direct import direct
from tunesmith.kernels.fp8 import quantize_rows_fp8
from tunesmith.kernels.gemv import (
    few_product,
    fp8_few_product,
    fp8_weight_product,
    nf4_product,
    takes,
    takes_float,
)
from tunesmith.kernels.nf4 import use_kernel
from tunesmith.model.decode_int4 import DecodeInt4Linear
from tunesmith.model.decoder import Decoder
from tunesmith.model.fp8 import Fp8Linear
from tunesmith.model.int4 import Int4Linear
from tunesmith.model.int8 import Int8Linear
from tunesmith.model.layers import Linear
from tunesmith.model.quant import NF4Linear

# Up to so many tokens fp8 weights are widened, which is exact and saves quantising the input; more are products in fp8.
# Measured on an H200, qkv, output, gate and up, down of Qwen2.5-7B together, us: one token widened 75, in fp8 129;
# sixteen widened 97, in fp8 126; sixty-four widened 191, in fp8 128.
FP8_WEIGHT_TOKENS = 16
Module = TypeVar("Module", bound=nn.Module)


class DecodeLinear(Linear):
    """A `Linear` whose product with one token, or few and a small weight, is our kernel's; nothing wants gradients."""

    def product(self, x_TD: Tensor) -> Tensor:
        """y_TF = x @ weight.T + bias in the dtype of x."""
        weight_FD, bias_F = self.weight, self.bias  # once: a module finds its parameters by way of a search
        if torch.is_grad_enabled() and (x_TD.requires_grad or weight_FD.requires_grad):
            return super().product(x_TD)
        flat = x_TD if x_TD.dim() == 2 else x_TD.flatten(0, -2)
        if takes("float", flat) and takes_float(flat, weight_FD):
            y_TF = few_product(flat, weight_FD, bias_F)
            return y_TF if x_TD.dim() == 2 else y_TF.view(*x_TD.shape[:-1], self.out_features)
        if weight_FD.dtype != x_TD.dtype or (bias_F is not None and bias_F.dtype != x_TD.dtype):
            return super().product(x_TD)
        return F.linear(x_TD, weight_FD, bias_F)


class DecodeNF4Linear(NF4Linear):
    """An `NF4Linear` whose product with one token reads the codes, not a dequantised weight."""

    def product(self, x_TD: Tensor) -> Tensor:
        """y_TF = x @ weight.T + bias in the dtype of x, without gradients."""
        flat = x_TD.flatten(0, -2)
        if not takes("nf4", flat):
            return super().product(x_TD)
        y_TF = nf4_product(flat, self._all_parts(), self.bias)
        return y_TF.view(*x_TD.shape[:-1], self.out_features)


class DecodeFp8Linear(Fp8Linear):
    """An `Fp8Linear` that widens its weight in registers where there are few tokens, and never quantises those.

    Of some tens of tokens the sums are cut where the weight alone does not fill the chip.
    """

    def product(self, x_TD: Tensor) -> Tensor:
        """y_TF = x @ weight.T + bias in the dtype of x, without gradients."""
        flat = x_TD.flatten(0, -2)
        if takes("fp8", flat) and (self.compute != "fp8" or flat.shape[0] <= FP8_WEIGHT_TOKENS):
            y_TF = fp8_weight_product(flat, self.codes, self.scale, self.bias)
        elif self.compute == "fp8" and not x_TD.is_cpu:
            y_TF = self.product_of_codes(*quantize_rows_fp8(flat), x_TD.dtype)
        else:
            return super().product(x_TD)
        return y_TF.view(*x_TD.shape[:-1], self.out_features)

    def wants_codes(self, num_tokens: int) -> bool:
        """Whether so many tokens are quantised and multiplied in fp8, so that who makes them may do the first."""
        return self.compute == "fp8" and not self.codes.is_cpu and num_tokens > FP8_WEIGHT_TOKENS

    def product_of_codes(self, codes_TD: Tensor, scale_T1: Tensor, dtype: torch.dtype) -> Tensor:
        """y_TF in a dtype, of an input that is quantised by rows."""
        return fp8_few_product(codes_TD, scale_T1, self.codes, self.scale, self.bias, dtype)


def swiglu_product(linear: nn.Module, x_TD: Tensor) -> Tensor | None:
    """silu(gate) * up of what a fused gate and up would give for x, [T, F / 2], in one launch.

    The bits are those of the product and of SwiGLU after it. None where there is no such kernel: more than few tokens,
    other forms of linears (with adapters, of rows that are fixed), another device.
    """
    if x_TD.dim() != 2 or not torch.is_inference_mode_enabled():
        return None
    held = held_for_few(linear, x_TD)
    if held is None:
        return None
    from tunesmith.kernels.gemv_operators import swiglu_few_operator
    from tunesmith.kernels.gemv_quads_triton import takes_quads

    if not takes_quads(held[0], x_TD):
        return None
    h_TI: Tensor = direct(swiglu_few_operator, x_TD)(held[0], x_TD, *held[1:], cast(Any, linear).bias)
    return h_TI


def held_for_few(linear: nn.Module, x_TD: Tensor) -> tuple[int, Tensor, Tensor | None, Tensor | None] | None:
    """Format, weight, scales and zero points, where `product` would multiply few tokens with them as they are."""
    if type(linear) is DecodeLinear and takes("float", x_TD) and takes_float(x_TD, linear.weight):
        return 0, linear.weight, None, None
    if type(linear) is Int8Linear and not linear.has_int8_products and takes("int8", x_TD):
        return 1, linear.codes, linear.scale, None
    if type(linear) is DecodeFp8Linear and takes("fp8", x_TD) and not linear.wants_codes(len(x_TD)):
        return 2, linear.codes, linear.scale, None
    if type(linear) in (Int4Linear, DecodeInt4Linear) and _is_widened(cast(Int4Linear, linear), x_TD):
        linear = cast(Int4Linear, linear)
        return 3, linear.words, linear.scales, linear.zeros
    return None


def _is_widened(linear: Int4Linear, x_TD: Tensor) -> bool:
    """Whether int4 codes are widened for these tokens, and not multiplied as bytes."""
    by_bytes = isinstance(linear, DecodeInt4Linear) and linear.wants_codes(len(x_TD), x_TD.dtype)
    return linear.order is None and takes("int4", x_TD) and not by_bytes


def use_decode_linears(model: nn.Module) -> None:
    """Put the forms above in place of a model's linears, sharing their tensors; where kernels do not run, none."""
    first = next(model.parameters(), None)
    if first is None or not use_kernel(first.device):
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            form = _form(child)
            if form is not None and name != "router":
                setattr(parent, name, adopted(form, child))


def hold_head_in_int8(decoder: Decoder) -> None:
    """Hold the head in int8, a scale for each token; a head tied to the embedding gets codes of its own beside it."""
    weight = decoder.embedding.weight if decoder.head is None else decoder.head.weight
    vocab_size, width = weight.shape
    head = Int8Linear(width, {"lm_head": vocab_size}, False, dtype=weight.dtype, device=weight.device)
    head.load_part("lm_head", weight.detach())
    decoder.head = cast(Linear, head.requires_grad_(False))


def adopted(form: type[Module], linear: nn.Module) -> Module:
    """A module of class `form`, a subclass of that of `linear`, with everything that `linear` holds."""
    out = form.__new__(form)
    out.__dict__.update(linear.__dict__)
    return out


def _form(linear: nn.Module) -> type[nn.Module] | None:
    forms: dict[type[nn.Module], type[nn.Module]] = {
        Linear: DecodeLinear,
        NF4Linear: DecodeNF4Linear,
        Fp8Linear: DecodeFp8Linear,
        Int4Linear: DecodeInt4Linear,
    }
    return forms.get(type(linear))

"""int4 linears that answer: few tokens' products by the integer units, of inputs that are put into bytes.

Who writes such a linear's input may write the bytes itself (norms and SwiGLU of the answering pass); else the linear
has them made. More tokens, and what the kernel does not have, are multiplied as `Int4Linear` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from tunesmith.kernels.add_rms_norm import add_rms_norm_
from tunesmith.kernels.int4_bytes import int4_bytes_product, takes_bytes
from tunesmith.kernels.x_bytes import add_rms_norm_bytes_, quantize_x_bytes, swiglu_bytes
from tunesmith.model.int4 import Int4Linear


class DecodeInt4Linear(Int4Linear):
    """An `Int4Linear` whose products of few tokens in 16 bits are of bytes."""

    def product(self, x_TD: Tensor) -> Tensor:
        """y_TF = x @ weight.T + bias in the dtype of x, without gradients."""
        flat = x_TD.flatten(0, -2)
        if not self.wants_codes(flat.shape[0], x_TD.dtype):
            return super().product(x_TD)
        y_TF = self.product_of_codes(quantize_x_bytes(flat), x_TD.dtype)
        return y_TF.view(*x_TD.shape[:-1], self.out_features)

    def wants_codes(self, num_tokens: int, dtype: torch.dtype) -> bool:
        """Whether so many tokens are multiplied as bytes, so that who makes them may write those."""
        return self.order is None and takes_bytes(self.held, num_tokens, dtype)

    def product_of_codes(self, x_bytes_TBW: Tensor, dtype: torch.dtype) -> Tensor:
        """y_TF in a dtype, of an input as kernels/x_bytes.py has it."""
        return int4_bytes_product(x_bytes_TBW, self.held, self.bias, dtype)


@dataclass(frozen=True)
class InBytes:
    """What a `DecodeInt4Linear` is to multiply, in bytes [T, D / 128, 72] in place of [T, D] in a dtype."""

    blocks_TBW: Tensor
    dtype: torch.dtype


Input = Tensor | InBytes


def product_of(linear: nn.Module, given: Input) -> Tensor:
    """What the linear gives, of whichever form its input has."""
    if isinstance(given, InBytes):
        return cast(DecodeInt4Linear, linear).product_of_codes(given.blocks_TBW, given.dtype)
    return cast(Tensor, linear(given))


def normed_for(reader: nn.Module | None, stream_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> Input:
    """`add_rms_norm_` as the linear that reads it wants it; None: a reader that is no linear."""
    if wants_bytes(reader, stream_TD):
        return InBytes(add_rms_norm_bytes_(stream_TD, delta_TD, weight_D, eps), stream_TD.dtype)
    return add_rms_norm_(stream_TD, delta_TD, weight_D, eps)


def swiglu_for(down: nn.Module, gate_up_TF: Tensor) -> InBytes | None:
    """silu(gate) * up in bytes, where the linear that reads it wants them."""
    return InBytes(swiglu_bytes(gate_up_TF), gate_up_TF.dtype) if wants_bytes(down, gate_up_TF) else None


def wants_bytes(linear: nn.Module | None, like_TD: Tensor) -> bool:
    """Whether this linear takes the tokens of a tensor in bytes. Not a subclass, nor one with adapters."""
    return type(linear) is DecodeInt4Linear and linear.wants_codes(len(like_TD), like_TD.dtype)

"""A step of few tokens without launches of its norms: who writes the stream prepares what its norm's reader multiplies.

    stream' = stream + x @ weight.T                    a block's last linears: output, down
    y       = norm(stream') @ weight.T                 the linears behind their norms: qkv, gate and up
    norm(s) = s / sqrt(mean(s^2) + eps) * g

The factor of a token, 1 / sqrt(...), can be taken out of the sums of the second product, so nobody has to know it
before they are made. The first product's launch, whose programs hold some rows (columns of the stream) each, writes

    stream'_TD     rounded as `add_rms_norm_` rounds it: the product to the dtype, then the sum
    x_TD           stream' * g, rounded once
    squares_TP     of each token, the sum of the squares of each program's part of stream', in float32

and the second's multiplies x as it would any input, adds the squares up in one order, and multiplies its sums in
float32 by the factors. x is read by every one of its programs, and costs none of them an instruction. For a weight in
fp8 x is given times 2^60, which is exact and what such products begin with.

Rounding: `add_rms_norm_` rounds stream' / rms and its product with g to the dtype, this once, so the error of norm and
product together is no larger. x is larger than a normed one by the stream's root mean square, which bfloat16 has room
for, and float16 has not: only bfloat16 goes this way. So does no step of more than `MOST_TOKENS`, whose norm is not
RMSNorm, whose processes add up, or whose linears have adapters: `model/stream_linears.py` decides.
Source of the norm: arXiv 1910.07467, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.kernels.swiglu import swiglu_reference

# 0: every norm is a launch of its own again.
MOST_TOKENS = 0
RAISED = 2.0**60
_FP8 = 2


@dataclass(frozen=True)
class Unscaled:
    """A norm's output but for each token's factor: x_TD = stream * weight (raised: times 2^60), squares_TP float32."""

    x_TD: Tensor
    squares_TP: Tensor
    eps: float
    is_raised: bool = False


@dataclass(frozen=True)
class Added:
    """What a product adds to the stream, and for whom: the norm behind it, and whether x is to be times 2^60.

    new_TD, squares_TP: where the new stream and its squares go.
    """

    stream_TD: Tensor
    norm_D: Tensor
    is_raised: bool
    new_TD: Tensor
    squares_TP: Tensor


def wants_raised(format_id: int) -> bool:
    """Whether products with weights of this format take their input times 2^60."""
    return format_id == _FP8


def added_reference(
    stream_TD: Tensor, y_TD: Tensor, norm_D: Tensor, eps: float, is_raised: bool
) -> tuple[Tensor, Unscaled]:
    """The new stream and what its norm's reader multiplies, by plain torch; 16 columns' squares are a part."""
    new_TD = stream_TD + y_TD
    wide = new_TD.float()
    x_TD = wide * norm_D.to(new_TD.dtype).float() * (RAISED if is_raised else 1.0)
    parts = torch.nn.functional.pad(wide.square(), (0, -wide.shape[1] % 16)).unflatten(1, (-1, 16))
    return new_TD, Unscaled(x_TD.to(new_TD.dtype), parts.sum(-1), eps, is_raised)


def factors_of(unscaled: Unscaled) -> Tensor:
    """factor_T1 in float32: what each token's sums are multiplied with."""
    mean_T1 = unscaled.squares_TP.sum(1, keepdim=True) / unscaled.x_TD.shape[1]
    return torch.rsqrt(mean_T1 + unscaled.eps)


def normed_reference(unscaled: Unscaled, weight_FD: Tensor, bias_F: Tensor | None, is_gated: bool) -> Tensor:
    """y_TF in the dtype of x, or with gates above what they gate silu(gate) * up [T, F / 2], by plain torch."""
    x_TD = unscaled.x_TD.float() / (RAISED if unscaled.is_raised else 1.0)
    y_TF = (x_TD @ weight_FD.float().t()) * factors_of(unscaled)
    y_TF = (y_TF if bias_F is None else y_TF + bias_F.float()).to(unscaled.x_TD.dtype)
    return swiglu_reference(y_TF) if is_gated else y_TF

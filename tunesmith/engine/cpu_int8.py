"""int8 products of few tokens on a CPU: large weights laid out for its integer units, small ones by torch's kernel.

    large   x = (high + low / 254) * scale, two int8 rows a token     codes in oneDNN's blocks, sums in int32
    small   codes widened in registers, activations in bfloat16       `_weight_int8pack_mm`, the codes as they lie

Measured on two cores of a Xeon with AMX, one token, us, as the codes lie and in blocks: [151936, 896] 10459 and 2813,
[9728, 896] 721 and 374, [896, 4864] 246 and 204, [896, 896] 73 and 102.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tunesmith.kernels.gemv import CPU_INT8_COLUMNS, CPU_SPLIT_TOKENS, CPU_TOKENS
from tunesmith.kernels.int8 import LARGEST, SMALLEST_SCALE
from tunesmith.model.int8 import Int8Linear

LARGE = 2**21
"""Weights of so many values are laid out in blocks."""
_FINE = 2 * LARGEST
_PACKED_FOR_ROWS = 2


def int8_of(linear: Int8Linear) -> Callable[[Tensor], Tensor]:
    """y_TF = x @ weight.T + bias in the dtype of x, for a weight that never changes."""
    scale_16 = linear.scale.to(torch.bfloat16)
    bias = None if linear.bias is None else linear.bias.detach()
    most_rows = CPU_TOKENS["int8"] if linear.in_features % CPU_INT8_COLUMNS == 0 else 0
    split = None
    if linear.codes.numel() >= LARGE and can_pack_int8():
        split = split_product_of(linear.codes, linear.scale)

    def run(x: Tensor) -> Tensor:
        if split is not None and x.shape[0] <= CPU_SPLIT_TOKENS:
            y = split(x)
        elif x.shape[0] <= most_rows:
            y = torch._weight_int8pack_mm(x.to(torch.bfloat16), linear.codes, scale_16).to(x.dtype)
        else:
            return linear.product(x)
        return y if bias is None else y.add_(bias)

    return run


def split_product_of(codes_FD: Tensor, scale_F: Tensor) -> Callable[[Tensor], Tensor]:
    """`int8_split_product` without a bias, of a weight in oneDNN's blocks: a copy of the codes."""
    ops: Any = torch.ops.onednn
    packed = ops.qlinear_prepack(codes_FD, [_PACKED_FOR_ROWS, codes_FD.shape[1]])
    zeros_F = torch.zeros(codes_FD.shape[0], dtype=torch.int64)

    def run(x: Tensor) -> Tensor:
        num_rows = x.shape[0]
        codes, scale_T1 = _halves(x)
        sums = ops.qlinear_pointwise(
            codes, 1.0, 0, packed, scale_F, zeros_F, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return sums[:num_rows].add_(sums[num_rows:], alpha=1 / _FINE).mul_(scale_T1).to(x.dtype)

    return run


def _halves(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [2 T, D], first of the high parts, then of what they leave in 254ths; scales float32 [T, 1]."""
    wide = x_TD.float()
    scale = torch.linalg.vector_norm(wide, torch.inf, 1, True).mul_(1 / LARGEST).clamp_(min=SMALLEST_SCALE)
    scaled = wide / scale
    high = scaled.round()
    return torch.cat((high, scaled.sub_(high).mul_(_FINE).round_())).to(torch.int8), scale


@cache
def can_pack_int8() -> bool:
    """Whether this build of torch multiplies by int8 weights in oneDNN's blocks, and gives the right sums."""
    codes = torch.arange(-60, 60, dtype=torch.int8).view(5, 24)
    x = torch.arange(48, dtype=torch.float32).view(2, 24)
    try:
        found = split_product_of(codes, torch.ones(5))(x)
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(found, x @ codes.float().t(), rtol=1e-3)

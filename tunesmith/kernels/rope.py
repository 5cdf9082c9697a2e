"""Rotary position embedding in place, of the query and key heads of a fused projection at once.

Pairs (i, i + H/2) of every head are rotated by the position's angle. Computed in float32 from float32 tables and
rounded once, where model.layers.apply_rope rounds the tables and both products to the stream's dtype: closer to the
exact rotation, and not the same bits in bfloat16.
Source: arXiv 2104.09864, section 3.4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.kernels import cpu_train
from tunesmith.kernels.in_float32 import in_float32_on_cpu
from tunesmith.kernels.nf4 import use_kernel


def rope_(x_TNH: Tensor, cos_TH2: Tensor, sin_TH2: Tensor, inverse: bool = False) -> None:
    """Rotate every head of x in place; `inverse` rotates back, which is also the gradient of the rotation.

    Args: x_TNH: any strides but the last, which is 1: the first N heads of a fused projection viewed as
    [T, N, H] need no copy. cos_TH2, sin_TH2: float32 [T, H/2], contiguous.
    """
    if use_kernel(x_TNH.device):
        from tunesmith.kernels.rope_triton import rope_operator

        rope_operator(x_TNH, cos_TH2, sin_TH2, inverse)
    elif x_TNH.dim() == 3 and cpu_train.takes(x_TNH, cos_TH2, sin_TH2):
        cpu_train.rope_(x_TNH, cos_TH2, sin_TH2, inverse)
    elif in_float32_on_cpu(x_TNH):
        _rope_in_place(x_TNH, cos_TH2, sin_TH2, inverse)
    else:
        rope_reference_(x_TNH, cos_TH2, sin_TH2, inverse)


def rope_reference_(x_TNH: Tensor, cos_TH2: Tensor, sin_TH2: Tensor, inverse: bool = False) -> None:
    """rope_ by plain torch: the truth that the kernel must equal."""
    cos, sin = cos_TH2[:, None, :], sin_TH2[:, None, :]
    if inverse:
        sin = -sin
    first, second = x_TNH.float().chunk(2, dim=-1)
    x_TNH.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))


def _rope_in_place(x_TNH: Tensor, cos_TH2: Tensor, sin_TH2: Tensor, inverse: bool) -> None:
    """rope_ by halves, with a copy of the first."""
    cos, sin = cos_TH2[:, None, :], sin_TH2[:, None, :]
    first, second = x_TNH.chunk(2, dim=-1)
    before, sign = first.clone(), -1 if inverse else 1
    first.mul_(cos).addcmul_(second, sin, value=-sign)
    second.mul_(cos).addcmul_(before, sin, value=sign)


def rope_tables_half(inverse_H2: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, each float32 [T, H/2] and contiguous.

    Args: inverse_H2: the inverse frequencies, float32 [H/2]. positions_T: integers.
    """
    angles = positions_T.float()[:, None] * inverse_H2[None, :]
    return angles.cos(), angles.sin()

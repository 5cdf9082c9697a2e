"""int4 products of few tokens on a CPU, through torch's kernel and its own layout of codes.

That kernel wants bfloat16 activations (its float32 form is plain C++, thirty times slower), scales and zeros as pairs:
w = (code - 8) * scale + zero. Measured on a Xeon with AVX-512, one thread, 9728 x 896, batch 1: bfloat16 1978 us, int8
1004 us, int4 831 us; from some 8 tokens on the dequantised weight is faster than either, see `gemv.CPU_ROWS`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.kernels.int4 import SYMMETRIC_ZERO, Int4Weight, padded_width, unpack_words

# torch's kernel takes output rows in multiples of this.
ROWS = 16
_INNER_TILES = 1


@dataclass(frozen=True)
class CpuInt4:
    """codes as torch's CPU kernel packs them, scales and zeros bfloat16 [D / G, F, 2], for widths of whole blocks."""

    codes: Tensor
    scales_and_zeros: Tensor
    group_size: int
    out_features: int


@torch.no_grad()
def pack_for_cpu(weight: Int4Weight) -> CpuInt4:
    """The weight in torch's layout; its rows padded to a multiple of 16."""
    missing = -weight.shape[0] % ROWS
    codes = unpack_words(weight.words, padded_width(weight.shape[1])).to(torch.int32)
    scales = F.pad(weight.scales.float(), (0, 0, 0, missing))
    zeros = torch.full_like(weight.scales, SYMMETRIC_ZERO) if weight.zeros is None else weight.zeros
    shift = (SYMMETRIC_ZERO - F.pad(zeros.float(), (0, 0, 0, missing))) * scales
    pairs = torch.stack((scales, shift), dim=-1).transpose(0, 1).contiguous().to(torch.bfloat16)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(F.pad(codes, (0, 0, 0, missing)), _INNER_TILES)
    return CpuInt4(packed, pairs, weight.group_size, weight.shape[0])


def cpu_product(x_TD: Tensor, weight: CpuInt4) -> Tensor:
    """y_TF in the dtype of x, the product in bfloat16."""
    width = weight.scales_and_zeros.shape[0] * weight.group_size
    x = x_TD.to(torch.bfloat16).contiguous()
    if x.shape[1] < width:
        x = F.pad(x, (0, width - x.shape[1]))
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight.codes, weight.group_size, weight.scales_and_zeros)
    return (y if y.shape[1] == weight.out_features else y[:, : weight.out_features]).to(x_TD.dtype)

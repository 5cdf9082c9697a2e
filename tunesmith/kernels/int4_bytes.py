"""Products of few tokens with int4 weights by the integer units: codes times an input in two bytes a value, exactly.

    y[t, f] = sum over groups of scale_w[f] * scale_x[t] * (sum of code * x code  -  zero * sum of x codes)  + bias[f]

What is in the parentheses is an integer below 2^31 and exact; it is multiplied and summed up in float32. What is lost
is what x loses in its blocks (kernels/x_bytes.py): each value 2^-15.97 of its block's largest at most, where bfloat16
itself has 2^-9 of the value. Beside widening codes to x's dtype that leaves out most instructions: the weight's words
are operands after one operation for four codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.kernels.chip import chip_of, known_by_chip
from tunesmith.kernels.direct import direct
from tunesmith.kernels.int4 import SYMMETRIC_ZERO, Int4Weight, unpack_words
from tunesmith.kernels.int4_layout import BLOCK
from tunesmith.kernels.nf4 import use_kernel
from tunesmith.kernels.x_bytes import x_codes_of, x_scales_of

# Up to so many tokens, by the weight's group: instructions of a warp for 16 rows and 256 columns, counted in SASS of
# sm_90, with zero points: 112 up to 4 tokens and 166 up to 8 where others take 297 (groups of 128); 140 up to 2 and 212
# up to 4 where they take 324 (64); 141, 212, 357 for 1, 2, 4 where they take 410 (32). Empty: no product goes this way.
MOST_TOKENS = {128: 8, 64: 4, 32: 4}
# Columns of a step: widths are multiples of it.
STEP = 256
# The first generation with these products.
_FIRST = (8, 0)


def takes_bytes(weight: Int4Weight, num_tokens: int, dtype: torch.dtype) -> bool:
    """Whether so many tokens are multiplied so: few, on a GPU, in 16 bits, a width of whole steps, columns in order."""
    device, width = weight.words.device, weight.shape[1]
    if not use_kernel(device) or weight.order is not None or width % STEP or dtype.itemsize != 2:
        return False
    return 0 < num_tokens <= MOST_TOKENS.get(weight.group_size, 0) and _has_products(device)


@known_by_chip
def _has_products(device: torch.device) -> bool:
    chip = chip_of(device)
    return chip is None or chip.capability >= _FIRST


def int4_bytes_product(x_bytes_TBW: Tensor, weight: Int4Weight, bias_F: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y_TF in `dtype`, of an input in bytes and a weight whose columns are in order."""
    if use_kernel(x_bytes_TBW.device):
        from tunesmith.kernels.int4_bytes_operator import int4_bytes_operator

        operator = direct(int4_bytes_operator, x_bytes_TBW)
        y_TF: Tensor = operator(x_bytes_TBW, weight.words, weight.scales, weight.zeros, bias_F, dtype)
        return y_TF
    return int4_bytes_reference(x_bytes_TBW, weight, bias_F, dtype)


def int4_bytes_reference(x_bytes_TBW: Tensor, weight: Int4Weight, bias_F: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`int4_bytes_product` by plain torch: the truth that the kernel must equal but for the order of its sums."""
    width, group = x_bytes_TBW.shape[1] * BLOCK, weight.group_size
    x_TGC = x_codes_of(x_bytes_TBW).flatten(1).unflatten(1, (-1, group)).double()
    scale_TG = x_scales_of(x_bytes_TBW).repeat_interleave(BLOCK // group, dim=1)
    codes_FGC = unpack_words(weight.words, width).unflatten(1, (-1, group)).double()
    zeros = SYMMETRIC_ZERO if weight.zeros is None else weight.zeros[..., None].double()
    sums_GTF = torch.bmm(x_TGC.transpose(0, 1), (codes_FGC - zeros).permute(1, 2, 0)).float()
    factors_GTF = scale_TG.t()[:, :, None] * weight.scales.float().t()[:, None, :]
    y_TF = (sums_GTF * factors_GTF).sum(0)
    return (y_TF if bias_F is None else y_TF + bias_F.float()).to(dtype)

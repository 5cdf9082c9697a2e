"""Inputs of products in two signed bytes a value, with a scale for each block of 128 columns: what integer units take.

    scale = largest magnitude of the block / 32,512      code = round(x / scale)      code = 256 high + low

The high byte is -127 .. 127, the low one -128 .. 127. A value is off by half a scale and a hundredth of that at most
(float32 rounds the scale and its inverse): 2^-15.97 of its block's largest. A block with an infinity or NaN has the
scale NaN and codes of zero, so that what it is multiplied with is NaN.

A block is 72 words of int32. Its codes lie as int4.py's nibbles do, so that a word of bytes meets a word of nibbles:

    words 0 .. 31    high bytes    word 16 j + i holds the columns i + 16 j + 32 q in its bytes q = 0 .. 3
    words 32 .. 63   low bytes     (j = 0: the even nibbles' columns of word i; j = 1: the odd ones')
    word 64          the scale's bits, float32
    words 65 .. 71   minus 16 times the sum of the codes: of the block, of its halves, of its quarters

Who writes an input writes it so (`add_rms_norm_bytes_`, `swiglu_bytes`), or it is made of one in 16 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.kernels.add_rms_norm import add_rms_norm_reference_
from tunesmith.kernels.direct import direct
from tunesmith.kernels.int4_layout import BLOCK
from tunesmith.kernels.nf4 import use_kernel
from tunesmith.kernels.swiglu import swiglu_reference
from tunesmith.kernels.x_bytes_layout import LARGEST_CODE, SCALE_AT, SMALLEST_SCALE


def quantize_x_bytes(x_TD: Tensor) -> Tensor:
    """The input's blocks, int32 [T, D / 128, 72]. D: a multiple of 128."""
    if use_kernel(x_TD.device):
        from tunesmith.kernels.x_bytes_triton import x_bytes_operator

        made: Tensor = direct(x_bytes_operator, x_TD)(x_TD)
        return made
    return x_bytes_reference(x_TD)


def add_rms_norm_bytes_(stream_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`quantize_x_bytes` of what `add_rms_norm_` gives, in its launch; the stream becomes stream + delta."""
    if use_kernel(stream_TD.device):
        from tunesmith.kernels.x_bytes_triton import add_rms_norm_bytes_operator

        made: Tensor = direct(add_rms_norm_bytes_operator, stream_TD)(stream_TD, delta_TD, weight_D, eps)
        return made
    return x_bytes_reference(add_rms_norm_reference_(stream_TD, delta_TD, weight_D, eps))


def swiglu_bytes(gate_up_TF: Tensor) -> Tensor:
    """`quantize_x_bytes` of silu(gate) * up, rounded to their dtype, in one launch."""
    if use_kernel(gate_up_TF.device):
        from tunesmith.kernels.x_bytes_triton import swiglu_bytes_operator

        made: Tensor = direct(swiglu_bytes_operator, gate_up_TF)(gate_up_TF)
        return made
    return x_bytes_reference(swiglu_reference(gate_up_TF))


def x_bytes_reference(x_TD: Tensor) -> Tensor:
    """`quantize_x_bytes` by plain torch: the truth that the kernels must equal."""
    blocks = x_TD.float().unflatten(1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    is_finite = torch.isfinite(largest)
    scale = (largest * (1 / LARGEST_CODE)).clamp(min=SMALLEST_SCALE)
    codes = torch.where(is_finite, (blocks * (1 / scale)).round(), 0.0).to(torch.int32)
    high = (codes + 128) >> 8
    scales = torch.where(is_finite, scale, torch.nan).view(torch.int32)
    sums = [codes.unflatten(2, (parts, -1)).sum(-1, dtype=torch.int32) * -16 for parts in (1, 2, 4)]
    return torch.cat([_words(high), _words(codes - 256 * high), scales, *sums], dim=2)


def _words(values_TBC: Tensor) -> Tensor:
    """Signed bytes [T, B, 128] as words [T, B, 32]."""
    places = values_TBC.unflatten(2, (4, 32)) & 255  # column 16 j + i of each quarter
    low, high = places[:, :, 0] | places[:, :, 1] << 8, places[:, :, 2] << 16 | places[:, :, 3] << 24
    return low | high


def x_codes_of(x_bytes_TBW: Tensor) -> Tensor:
    """The codes int32 [T, B, 128], columns in their order."""
    words = x_bytes_TBW[:, :, :SCALE_AT].unflatten(2, (2, 32))
    places = torch.stack([words << 24 >> 24, words << 16 >> 24, words << 8 >> 24, words >> 24], dim=3)
    both = places.flatten(3)
    return both[:, :, 0] * 256 + both[:, :, 1]


def x_scales_of(x_bytes_TBW: Tensor) -> Tensor:
    """The scales float32 [T, B]."""
    return x_bytes_TBW[:, :, SCALE_AT].contiguous().view(torch.float32)


def x_of_bytes(x_bytes_TBW: Tensor, dtype: torch.dtype) -> Tensor:
    """The values [T, D] that the blocks stand for."""
    values = x_codes_of(x_bytes_TBW) * x_scales_of(x_bytes_TBW)[:, :, None]
    return values.flatten(1).to(dtype)

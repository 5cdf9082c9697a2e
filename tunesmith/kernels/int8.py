"""int8 weights with a scale for each output row, and products with them: weight-only, and int8 times int8.

    w[f, k] = code[f, k] * scale[f]             scale[f] = largest |w[f, :]| / 127, code in -127 .. 127
    weight-only    y = x @ w.T                  codes widened in registers, sums in float32; or, on a CPU, x as the sum
                                                of two int8 matrices and sums in int32
    W8A8           y = (cx @ code.T) * sx * s   x quantised by rows as it comes, sums exact in int32

Symmetric by rows on both sides, so the scales leave the sum over k, and no zero points are needed.
Source: arXiv 2208.07339, section 2.1 (vector-wise quantisation).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.kernels.nf4 import use_kernel

LARGEST = 127
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# torch's int8 product on a GPU wants more rows than this, and sides that are multiples of 8.
LEAST_CUDA_ROWS = 17
# Values widened at once: bounds the float32 copies.
CHUNK = 2**24


@dataclass(frozen=True)
class Int8Weight:
    """A weight [F, D] in int8: weight[f, d] = codes[f, d] * scale[f]. scale: float32 [F]; dtype: what it was."""

    codes: Tensor
    scale: Tensor
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes held, scales included."""
        return self.codes.nbytes + self.scale.nbytes


@torch.no_grad()
def quantize_int8(weight_FD: Tensor) -> Int8Weight:
    """The int8 form of a weight, on its device; at most a chunk is held in float32 besides."""
    num_rows, width = weight_FD.shape
    codes = torch.empty(num_rows, width, dtype=torch.int8, device=weight_FD.device)
    scale = torch.empty(num_rows, device=weight_FD.device)
    step = max(1, CHUNK // max(1, width))
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        codes[rows], part = quantize_rows_int8(weight_FD[rows].detach())
        scale[rows] = part[:, 0]
    return Int8Weight(codes, scale, weight_FD.dtype)


def quantize_rows_int8(x_TD: Tensor, largest_T1: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes int8 [T, D] and scales float32 [T, 1] of the rows of x: rounded to the nearest, ties to even.

    largest_T1: the largest magnitudes, float32, where x is only a part of its rows.
    """
    wide = x_TD.float()
    largest_T1 = wide.abs().amax(dim=1, keepdim=True) if largest_T1 is None else largest_T1
    scale = (largest_T1 * (1 / LARGEST)).clamp(min=SMALLEST_SCALE)
    codes = (wide * (1.0 / scale)).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return codes, scale


def dequantize_int8(codes_FD: Tensor, scale_F: Tensor, dtype: torch.dtype) -> Tensor:
    """codes * scale [F, D] in `dtype`, multiplied in float32; holds at most a chunk besides the result."""
    if use_kernel(codes_FD.device):
        from tunesmith.kernels.int4_triton import int8_dequantize_operator

        return int8_dequantize_operator(codes_FD, scale_F, dtype)
    if codes_FD.device.type == "cpu" and dtype == torch.bfloat16:
        return codes_FD.to(dtype) * scale_F.to(dtype)[:, None]  # a pass less; the scale is rounded first
    out = torch.empty(codes_FD.shape, dtype=dtype, device=codes_FD.device)
    step = max(1, CHUNK // max(1, codes_FD.shape[1]))
    for start in range(0, codes_FD.shape[0], step):
        rows = slice(start, start + step)
        out[rows] = codes_FD[rows].float() * scale_F[rows, None]
    return out


def int8_integer_product(
    x_TD: Tensor, codes_FD: Tensor, scale_F: Tensor, bias_F: Tensor | None, largest_T1: Tensor | None = None
) -> Tensor:
    """W8A8: y_TF in the dtype of x, the activations quantised by rows, the sum over D exact in int32.

    largest_T1: see `quantize_rows_int8`.
    """
    codes_TD, scale_T1 = quantize_rows_int8(x_TD, largest_T1)
    sums_TF = _int_product(codes_TD, codes_FD)
    y_TF = sums_TF * scale_T1 * scale_F
    return (y_TF if bias_F is None else y_TF + bias_F.float()).to(x_TD.dtype)


def int8_split_product(x_TD: Tensor, codes_FD: Tensor, scale_F: Tensor, bias_F: Tensor | None) -> Tensor:
    """Weight-only: y_TF in the dtype of x, the activations as the sum of two int8 matrices, one integer product.

        x = (high + low / 254) * scale          15 bits of the largest of a row, more than bfloat16 has

    For CPUs: their integer units are fast, and nothing has to be widened. Sums are exact in int32.
    """
    num_rows = x_TD.shape[0]
    high, scale_T1 = quantize_rows_int8(x_TD)
    rest = (x_TD.float() / scale_T1).sub_(high).mul_(2 * LARGEST)
    low = rest.round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    sums = _int_product(torch.cat((high, low)), codes_FD)
    y_TF = sums[:num_rows].float()
    y_TF.add_(sums[num_rows:], alpha=1 / (2 * LARGEST)).mul_(scale_T1).mul_(scale_F)
    return (y_TF if bias_F is None else y_TF.add_(bias_F.float())).to(x_TD.dtype)


def _int_product(codes_TD: Tensor, codes_FD: Tensor) -> Tensor:
    """int32 [T, F] = codes_TD @ codes_FD.T."""
    if codes_TD.device.type != "cuda":
        return torch._int_mm(codes_TD, codes_FD.t())
    num_rows = codes_TD.shape[0]
    if codes_FD.shape[0] % 8 or codes_FD.shape[1] % 8:
        return int_product_reference(codes_TD, codes_FD)
    missing = max(LEAST_CUDA_ROWS - num_rows, 0) + -max(LEAST_CUDA_ROWS, num_rows) % 8
    padded = F.pad(codes_TD, (0, 0, 0, missing)) if missing else codes_TD
    return torch._int_mm(padded, codes_FD.t())[:num_rows]


def int_product_reference(codes_TD: Tensor, codes_FD: Tensor) -> Tensor:
    """The same in float64, which is exact: the truth, and the way of widths that torch's product does not take."""
    return (codes_TD.double() @ codes_FD.double().t()).to(torch.int32)

"""fp8 (e4m3): rows of codes that share a float32 scale each, and the product of two such matrices.

    x[t, k] = code[t, k] * scale[t]         scale[t] = largest |x[t, :]| / 448, so that no code saturates
    y       = x @ w.T                       scales of both sides factor out of the sum over k

A weight w = diag(s) C has a scale for each output row f. Its product with a gradient, g @ w = (g diag(s)) @ C, sums
over f, where s can't factor out: s is folded into the columns of g before g is quantised, and C needs no scale then.
The second operand of a product is held as [N, K]: of g @ w that is C transposed, made on the fly by `transpose_fp8`.

Gradients are e4m3 like activations: with a scale for each row the range of e5m2 is not needed.
Source: arXiv 2209.05433 (the format); scales by row are this project's choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tunesmith.errors import DeviceError
from tunesmith.hardware import FIRST_FP8
from tunesmith.kernels.chip import chip_of, is_gpu
from tunesmith.kernels.direct import direct
from tunesmith.kernels.fp8_weight import ALIGNMENT
from tunesmith.kernels.fp8_weight import FP8 as FP8
from tunesmith.kernels.fp8_weight import LARGEST as LARGEST
from tunesmith.kernels.fp8_weight import SMALLEST_SCALE as SMALLEST_SCALE
from tunesmith.kernels.fp8_weight import Fp8Weight as Fp8Weight
from tunesmith.kernels.nf4 import use_kernel

Codes = tuple[Tensor, Tensor]
"""Codes [T, K] and their scales float32 [T, 1]: a matrix quantised by rows."""


@dataclass
class FastSums:
    """Where fp8 products add up in the tensor cores' own short registers, by direction.

    Of an fp8 product's sum Hopper's cores keep some 14 bits; "fast" leaves it there for the whole of K, otherwise it is
    moved to float32 every 128 terms, which costs instructions in the inner loop. Forward, K is the model's width, and
    what is lost (3e-4 of a sum of terms of one sign for each 2^-13 cut off) is below the 2^-4 that rounding the inputs
    to e4m3 costs. Backward, the sums are as long as the layer is wide (37,888 for gate and up of a 7B model), and
    errors of every block add up on the stream's way down: where precision may matter, it is there. Both are switches,
    read at every product (recorded graphs keep what they were recorded with): which one costs what is to be measured.
    """

    forward: bool = True
    backward: bool = True


FAST_SUMS = FastSums()
# Values quantised at once by plain torch: bounds its float32 copies.
CHUNK = 2**24


def has_fp8(device: torch.device | str) -> bool:
    """Whether the device has fp8 products: GPUs from sm_89 on (Ada, Hopper, Blackwell)."""
    chosen = torch.device(device)
    if chosen.type == "cuda":
        return torch.cuda.get_device_capability(chosen) >= FIRST_FP8
    chip = chip_of(chosen) if is_gpu(chosen) else None
    return chip is not None and chip.capability >= FIRST_FP8


def use_fp8_kernel(device: torch.device) -> bool:
    """Whether kernels that write fp8 run on this device: Triton compiles the conversion for sm_89 on, not before."""
    return use_kernel(device) and (not is_gpu(device) or has_fp8(device))


def require_fp8(device: torch.device | str) -> None:
    """Refuse a GPU without fp8 products. A CPU has none either: there the reference runs, for tests and tiny runs.

    Raises: DeviceError naming what to use instead.
    """
    chosen = torch.device(device)
    if chosen.type != "cuda" or has_fp8(chosen):
        return
    major, minor = torch.cuda.get_device_capability(chosen)
    raise DeviceError(
        f"{torch.cuda.get_device_name(chosen)} (sm_{major}{minor}) has no fp8 products, which need sm_89 or newer: "
        f"hold the base in bfloat16 (method.base=checkpoint), or in NF4 (method.kind=qlora method.fp8_compute=false); "
        f"full fine-tuning multiplies in bfloat16 (method.fp8_compute=false)"
    )


def without_products(device: torch.device | str) -> str | None:
    """What is said of fp8 weights on a GPU that has no products of them; None where it has, and on a CPU."""
    chosen = torch.device(device)
    if chosen.type != "cuda" or has_fp8(chosen):
        return None
    major, minor = torch.cuda.get_device_capability(chosen)
    return (
        f"{torch.cuda.get_device_name(chosen)} (sm_{major}{minor}) has no fp8 products, which need sm_89 or newer: the "
        f"weights are held in fp8, half of bfloat16's bytes, and multiplied in the compute dtype; prompts gain nothing"
    )


def quantize_rows_fp8(x_TD: Tensor, fold_D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes [T, D] and scales float32 [T, 1] of x, whose columns are multiplied by `fold_D` (float32) before.

    scale = largest of the row / 448, never 0; rounded to the nearest, ties to even. What is not finite stays so: the
    codes of an infinity and of NaN are NaN.
    """
    if not use_fp8_kernel(x_TD.device):
        return quantize_rows_reference(x_TD, fold_D)
    from tunesmith.kernels.fp8_triton import quantize_rows_operator

    codes_TD, scale_T1 = direct(quantize_rows_operator, x_TD)(x_TD, fold_D)
    return codes_TD, scale_T1


def quantize_rows_reference(x_TD: Tensor, fold_D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`quantize_rows_fp8` by plain torch: the truth that the kernel must equal."""
    num_rows, width = x_TD.shape
    codes = torch.empty(x_TD.shape, dtype=FP8, device=x_TD.device)
    scale = torch.empty(num_rows, 1, device=x_TD.device)
    step = max(1, CHUNK // max(1, width))
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        wide = x_TD[rows].float()
        wide = wide if fold_D is None else wide * fold_D
        scale[rows] = row_scale(wide.abs().amax(dim=1, keepdim=True))
        codes[rows] = to_codes(wide, scale[rows])
    return codes, scale


def row_scale(largest: Tensor) -> Tensor:
    """The scale of rows whose largest magnitude is this: float32, never 0."""
    return (largest * (1 / LARGEST)).clamp(min=SMALLEST_SCALE)


def to_codes(wide: Tensor, scale: Tensor) -> Tensor:
    """float32 values in units of their scale, rounded to fp8."""
    # Multiplied by the reciprocal, as the kernel does; clamped, since the edge may be passed by a rounding.
    return (wide * (1.0 / scale)).clamp(-LARGEST, LARGEST).to(FP8)


def transpose_fp8(codes_FD: Tensor) -> Tensor:
    """codes_DF, contiguous."""
    if not use_kernel(codes_FD.device):
        return codes_FD.view(torch.uint8).t().contiguous().view(FP8)
    from tunesmith.kernels.fp8_triton import transpose_operator

    return transpose_operator(codes_FD)


def fp8_product(
    x_codes_TK: Tensor,
    x_scale_T1: Tensor,
    w_codes_NK: Tensor,
    w_scale_N: Tensor | None,
    bias_N: Tensor | None,
    out_dtype: torch.dtype,
    *,
    backward: bool = False,
) -> Tensor:
    """y_TN = (x_codes * x_scale) @ (w_codes * w_scale).T + bias, in `out_dtype`. `w_scale_N` None: 1 everywhere.

    On a GPU torch's scaled product: sums as `FAST_SUMS` says for a product of the forward or the `backward` pass, the
    output rounded to bfloat16 first; widths that are no multiple of 16, and a CPU, take the reference.
    Raises: DeviceError on a GPU without fp8.
    """
    if not x_codes_TK.is_cuda:
        return product_reference(x_codes_TK, x_scale_T1, w_codes_NK, w_scale_N, bias_N, out_dtype)
    _check_once(x_codes_TK.device)
    if w_codes_NK.shape[0] % ALIGNMENT or w_codes_NK.shape[1] % ALIGNMENT:
        return product_reference(x_codes_TK, x_scale_T1, w_codes_NK, w_scale_N, bias_N, out_dtype)
    scale_N = _ones(w_codes_NK.shape[0], w_codes_NK.device) if w_scale_N is None else w_scale_N
    y_TN = torch._scaled_mm(
        x_codes_TK,
        w_codes_NK.t(),
        scale_a=x_scale_T1,
        scale_b=scale_N.view(1, -1),
        bias=None if bias_N is None else bias_N.to(torch.bfloat16),
        out_dtype=torch.bfloat16,  # the one output that scales by row have everywhere
        use_fast_accum=FAST_SUMS.backward if backward else FAST_SUMS.forward,
    )
    return y_TN.to(out_dtype)


def product_reference(
    x_codes_TK: Tensor,
    x_scale_T1: Tensor,
    w_codes_NK: Tensor,
    w_scale_N: Tensor | None,
    bias_N: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`fp8_product` in float32 by plain torch: the same codes and scales, rounded once at the end."""
    y_TN = (x_codes_TK.float() @ w_codes_NK.float().t()) * x_scale_T1
    y_TN = y_TN if w_scale_N is None else y_TN * w_scale_N
    y_TN = y_TN if bias_N is None else y_TN + bias_N.float()
    return y_TN.to(out_dtype)


@torch.no_grad()
def quantize_fp8_weight(weight_FD: Tensor) -> Fp8Weight:
    """The fp8 form of a weight, on its device, a scale for each output row."""
    codes, scale = quantize_rows_fp8(weight_FD.detach())
    num_rows, num_columns = weight_FD.shape
    return Fp8Weight(codes, scale.view(-1), (num_rows, num_columns), weight_FD.dtype)


def dequantize_fp8_weight(weight: Fp8Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [F, D] in `dtype` (None: its own), multiplied in float32. Not for a transposed one."""
    return dequantize_rows(weight.codes, weight.scale, dtype or weight.dtype)


def dequantize_rows(codes_FD: Tensor, scale_F: Tensor, dtype: torch.dtype) -> Tensor:
    """codes * scale [F, D] in `dtype`; holds at most a chunk in float32 besides the result."""
    out = torch.empty(codes_FD.shape, dtype=dtype, device=codes_FD.device)
    step = max(1, CHUNK // max(1, codes_FD.shape[1]))
    for start in range(0, codes_FD.shape[0], step):
        rows = slice(start, start + step)
        out[rows] = codes_FD[rows].float() * scale_F[rows, None]
    return out


@cache
def _check_once(device: torch.device) -> None:
    require_fp8(device)


@cache
def _ones(count: int, device: torch.device) -> Tensor:
    return torch.ones(count, device=device)

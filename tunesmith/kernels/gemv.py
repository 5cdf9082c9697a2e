"""Products of few tokens with a weight in any format: which kernel runs, by device, format and number of tokens.

At decode a product reads its weight once and does little else, so the floor is bytes over bandwidth. What a kernel
reads for an output row of D columns:

    bfloat16 2 D      int8, fp8 D + 4      int4 D / 2 + 2 D / G (+ D / G with zero points)      NF4 D / 2 + 4 D / 64

On a GPU up to `MOST_TOKENS` go through our kernels (weights widened in registers; 16 bits: `takes_float`); more go
through the dequantised weight and cuBLAS, where the product's own time hides the extra pass. On a CPU torch's
weight-only kernels take up to `CPU_TOKENS`, in bfloat16; more of int8 up to `CPU_SPLIT_TOKENS` go through the integer
units (`int8_split_product`), all others through the dequantised weight, in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.kernels.direct import direct
from tunesmith.kernels.fp8 import dequantize_rows, fp8_product
from tunesmith.kernels.int4 import Int4Weight, dequantize_int4
from tunesmith.kernels.int4_cpu import CpuInt4, cpu_product
from tunesmith.kernels.int8 import dequantize_int8, int8_split_product
from tunesmith.kernels.launch import num_processors
from tunesmith.kernels.nf4 import NF4Weight, dequantize_nf4, use_kernel

Format = Literal["float", "int8", "fp8", "int4", "nf4"]
MOST_TOKENS: dict[Format, int] = {"float": 8, "int8": 64, "fp8": 64, "int4": 64, "nf4": 1}
# Weights of 16 bits up to so many bytes, with several tokens: of small ones cuBLAS starts too few programs. With one
# token all of them: on an H200 qkv, output, gate and up, down of Qwen2.5-7B took it 11.1, 10.7, 72.7, 40.9 us, and our
# kernel 10.5, 8.8, 69.7, 37.7.
FLOAT_BYTES = 2**24
# Columns that a step of that kernel reads.
FLOAT_STEP = 64
CPU_TOKENS: dict[Format, int] = {"int8": 2, "int4": 64}
# int8 up to so many goes through the integer units, more through the dequantised weight.
CPU_SPLIT_TOKENS = 96
# torch's int8 kernel for CPUs gives wrong sums at other widths (seen with 40 columns and 3 tokens, torch 2.13).
CPU_INT8_COLUMNS = 64
# Columns that one lane reads at once, by format: a row is a multiple of them.
_COLUMNS: dict[Format, int] = {"float": 8, "int8": 16, "fp8": 16, "int4": 1, "nf4": 64}


def takes(name: Format, x_TD: Tensor) -> bool:
    """Whether our kernel takes this product: on a GPU, few tokens, several only in 16 bits, a width it can read."""
    if not use_kernel(x_TD.device) or x_TD.shape[1] % _COLUMNS[name]:
        return False
    return x_TD.shape[0] == 1 or (x_TD.shape[0] <= MOST_TOKENS[name] and x_TD.dtype.itemsize == 2)


def takes_float(x_TD: Tensor, weight_FD: Tensor) -> bool:
    """Whether our kernel is the faster for this weight of 16 bits: a small one or one token; whole steps of columns."""
    return (
        weight_FD.dtype == x_TD.dtype
        and weight_FD.dtype.itemsize == 2
        and (weight_FD.nbytes <= FLOAT_BYTES or x_TD.shape[0] == 1)
        and weight_FD.shape[1] % FLOAT_STEP == 0
        and weight_FD.is_contiguous()
    )


def float_product(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    """y_TF = x @ weight.T + bias in the dtype of x, which is the weight's."""
    if takes("float", x_TD) and takes_float(x_TD, weight_FD):
        return few_product(x_TD, weight_FD, bias_F)
    return F.linear(x_TD, weight_FD.to(x_TD.dtype), None if bias_F is None else bias_F.to(x_TD.dtype))


def few_product(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    """`float_product` of what `takes` and `takes_float` have taken."""
    from tunesmith.kernels.gemv_operators import float_operator

    return _called(float_operator, x_TD, weight_FD, bias_F)


def int8_product(x_TD: Tensor, codes_FD: Tensor, scale_F: Tensor, bias_F: Tensor | None) -> Tensor:
    """y_TF = x @ (codes * scale).T + bias in the dtype of x; weight-only."""
    if takes("int8", x_TD):
        from tunesmith.kernels.gemv_operators import int8_operator

        return _called(int8_operator, x_TD, codes_FD, scale_F, bias_F)
    if x_TD.device.type == "cpu":
        return _int8_on_cpu(x_TD, codes_FD, scale_F, bias_F)
    return dense_product(x_TD, dequantize_int8(codes_FD, scale_F, dense_dtype(x_TD)), bias_F)


def _int8_on_cpu(x_TD: Tensor, codes_FD: Tensor, scale_F: Tensor, bias_F: Tensor | None) -> Tensor:
    num_tokens, width = x_TD.shape
    if num_tokens > CPU_SPLIT_TOKENS:
        return dense_product(x_TD, dequantize_int8(codes_FD, scale_F, torch.bfloat16), bias_F)
    if num_tokens > CPU_TOKENS["int8"] or width % CPU_INT8_COLUMNS:
        return int8_split_product(x_TD, codes_FD, scale_F, bias_F)
    y_TF = torch._weight_int8pack_mm(x_TD.to(torch.bfloat16), codes_FD, scale_F.to(torch.bfloat16)).to(x_TD.dtype)
    return y_TF if bias_F is None else y_TF + bias_F.to(x_TD.dtype)


def int4_product(x_TD: Tensor, weight: Int4Weight, bias_F: Tensor | None, cpu: CpuInt4 | None = None) -> Tensor:
    """y_TF = x @ weight.T + bias in the dtype of x. cpu: the weight in the form of torch's CPU kernel."""
    if takes("int4", x_TD):
        from tunesmith.kernels.gemv_operators import int4_operator

        return _called(int4_operator, x_TD, weight.words, weight.scales, weight.zeros, bias_F)
    if cpu is not None and x_TD.shape[0] <= CPU_TOKENS["int4"]:
        y_TF = cpu_product(x_TD, cpu)
        return y_TF if bias_F is None else y_TF + bias_F.to(x_TD.dtype)
    return dense_product(x_TD, dequantize_int4(weight, dense_dtype(x_TD)), bias_F)


def fp8_weight_product(x_TD: Tensor, codes_FD: Tensor, scale_F: Tensor, bias_F: Tensor | None) -> Tensor:
    """y_TF = x @ (codes * scale).T + bias in the dtype of x: weight-only, also on chips without fp8 products."""
    if takes("fp8", x_TD):
        from tunesmith.kernels.gemv_operators import fp8_operator

        return _called(fp8_operator, x_TD, codes_FD, scale_F, bias_F)
    return dense_product(x_TD, dequantize_rows(codes_FD, scale_F, dense_dtype(x_TD)), bias_F)


def fp8_few_product(
    x_codes_TD: Tensor, x_scale_T1: Tensor, codes_FD: Tensor, scale_F: Tensor, bias_F: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`fp8_product` of a GPU, which cuts a sum into parts where tiles are too few to fill the chip.

    On an H200 torch's product of 64 tokens with [3584, 18944] took 53 us, what its bytes take being 16.
    """
    parts = 1
    if use_kernel(x_codes_TD.device):
        from tunesmith.kernels.fp8_split_triton import num_parts, split_product_operator

        num_rows, width = codes_FD.shape
        parts = num_parts(x_codes_TD.shape[0], num_rows, width, num_processors(x_codes_TD.device))
    if parts == 1:
        return fp8_product(x_codes_TD, x_scale_T1, codes_FD, scale_F, bias_F, dtype)
    return _called(split_product_operator, x_codes_TD, x_scale_T1, codes_FD, scale_F, bias_F, parts).to(dtype)


def nf4_product(x_TD: Tensor, parts: list[NF4Weight], bias_F: Tensor | None) -> Tensor:
    """y_TF = x @ weight.T + bias in the dtype of x, of the parts of a fused weight below each other."""
    if takes("nf4", x_TD):
        from tunesmith.kernels.gemv_operators import nf4_operator

        empty = x_TD.new_empty(0, dtype=torch.float32)
        inner = [empty if part.scale_scales is None else part.scale_scales for part in parts]
        offsets = [empty if part.offset is None else part.offset for part in parts]
        return _called(nf4_operator, x_TD, [p.codes for p in parts], [p.scales for p in parts], inner, offsets, bias_F)
    return dense_product(x_TD, dequantize_nf4(parts, x_TD.dtype), bias_F)


def _called(operator: Callable[..., Any], x: Tensor, *rest: Any) -> Tensor:
    """What the operator gives for x and the rest, past torch's dispatcher where nothing has to see it."""
    y: Tensor = direct(operator, x)(x, *rest)
    return y


def dense_dtype(x_TD: Tensor) -> torch.dtype:
    """What a product with a dequantised weight is in: the dtype of x; on a CPU bfloat16, as few tokens' products."""
    return torch.bfloat16 if x_TD.device.type == "cpu" else x_TD.dtype


def dense_product(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    """y_TF in the dtype of x, the product in the weight's."""
    y_TF = F.linear(x_TD.to(weight_FD.dtype), weight_FD).to(x_TD.dtype)
    return y_TF if bias_F is None else y_TF + bias_F.to(x_TD.dtype)

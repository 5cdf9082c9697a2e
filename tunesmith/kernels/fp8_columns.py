"""The transpose of a matrix, quantised to fp8 by its own rows: a scale for each column of what went in.

    codes_DT, scale_D1 = quantize_columns_fp8(x_TD)          x[t, d] = codes[d, t] * scale[d]

A weight's gradient g.T @ x sums over tokens, so its operands need scales that are constant along tokens; and g @ W sums
over the rows of W, so W needs a scale for each of its columns. In both, the operands of an fp8 product are what this
gives. T is padded with zeros to a multiple of `fp8_weight.ALIGNMENT`, which changes no sum.
Source: arXiv 2209.05433 (the format); which scales is this project's choice, see `fp8`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.kernels.fp8 import quantize_rows_reference, use_fp8_kernel
from tunesmith.kernels.fp8_weight import padded


def quantize_columns_fp8(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [D, T padded] and scales float32 [D, 1] of the transpose of x.

    scale = largest of the column / 448, never 0; rounded as `quantize_rows_fp8` does. A column with NaN is NaN.
    """
    if not use_fp8_kernel(x_TD.device):
        return quantize_columns_reference(x_TD)
    from tunesmith.kernels.fp8_columns_triton import quantize_columns_operator

    return quantize_columns_operator(x_TD)


def quantize_columns_reference(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_columns_fp8` by plain torch: the truth that the kernel must equal."""
    return quantize_rows_reference(torch.nn.functional.pad(x_TD.t(), (0, padded(x_TD.shape[0]) - x_TD.shape[0])))

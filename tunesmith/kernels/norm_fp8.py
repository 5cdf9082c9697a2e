"""RMSNorm whose result is also quantised to fp8, row by row, in the same pass.

A projection with an fp8 base reads only codes; quantising the norm's result by itself reads it from memory once more.
"""

from __future__ import annotations

from torch import Tensor

from tunesmith.kernels.fp8 import quantize_rows_reference
from tunesmith.kernels.nf4 import use_kernel
from tunesmith.kernels.rms_norm import rms_norm_reference


def rms_norm_fp8(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`rms_norm` of x, and `quantize_rows_fp8` of its rounded result.

    y and codes have the bits that `rms_norm_again` and `quantize_rows_fp8` make of the rstd returned here. rstd itself
    may differ in its last bit from that of `rms_norm`: on a GPU a row is summed in another order, since a thread that
    writes 16 bytes of codes holds more values.
    Returns: y [T, D] contiguous, of x's dtype; rstd float32 [T]; codes float8_e4m3fn [T, D]; scale float32 [T, 1].
    """
    if not use_kernel(x_TD.device):
        return rms_norm_fp8_reference(x_TD, weight_D, eps)
    from tunesmith.kernels.norm_fp8_triton import rms_norm_fp8_operator

    return rms_norm_fp8_operator(x_TD, weight_D, eps)


def rms_norm_fp8_reference(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rms_norm_fp8 by plain torch, one after the other."""
    y_TD, rstd_T = rms_norm_reference(x_TD, weight_D, eps)
    codes_TD, scale_T1 = quantize_rows_reference(y_TD)
    return y_TD, rstd_T, codes_TD, scale_T1

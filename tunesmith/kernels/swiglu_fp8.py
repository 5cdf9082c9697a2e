"""SwiGLU whose result goes into a product in fp8: quantised by rows as it is made, and never written in 16 bits.

    h = silu(gate) * up, rounded to the dtype of gate;   codes, scale = quantize_rows_fp8(h)

Apart, h [T, I] is written once and read twice: at many tokens most of what the two kernels move.
"""

from __future__ import annotations

from torch import Tensor

from tunesmith.kernels.direct import direct
from tunesmith.kernels.fp8 import quantize_rows_fp8, use_fp8_kernel
from tunesmith.kernels.swiglu import swiglu

# A program holds a row in its registers.
WIDEST = 32768


def swiglu_rows_fp8(gate_up_TF: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [T, I] and scales float32 [T, 1] of SwiGLU's result, with the bits of `quantize_rows_fp8` of it."""
    if not use_fp8_kernel(gate_up_TF.device) or gate_up_TF.shape[1] > 2 * WIDEST:
        return quantize_rows_fp8(swiglu(gate_up_TF))
    from tunesmith.kernels.swiglu_fp8_triton import swiglu_rows_operator

    codes, scale = direct(swiglu_rows_operator, gate_up_TF)(gate_up_TF)
    return codes, scale

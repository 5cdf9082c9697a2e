"""SwiGLU and its gradient whose results are also quantised to fp8, row by row, while they are still in the cache.

The products after them, with an fp8 base, read only codes. What is quantised is the rounded result: the codes and
scales have the bits that `quantize_rows_fp8` gives afterwards. The adapters' sums are those of `swiglu_low_rank`.
"""

from __future__ import annotations

from torch import Tensor

from tunesmith.kernels.fp8 import quantize_rows_reference
from tunesmith.kernels.nf4 import use_kernel
from tunesmith.kernels.swiglu_low_rank import swiglu_low_rank_backward_reference, swiglu_low_rank_reference


def swiglu_fp8(gate_up_TF: Tensor, low_TR: Tensor | None, up_FR: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`swiglu_low_rank`, and `quantize_rows_fp8` of its result.

    Returns: h [T, I] of gate_up's dtype; codes float8_e4m3fn [T, I]; scale float32 [T, 1].
    """
    if not use_kernel(gate_up_TF.device):
        return swiglu_fp8_reference(gate_up_TF, low_TR, up_FR)
    from tunesmith.kernels.swiglu_fp8_triton import swiglu_fp8_operator

    return swiglu_fp8_operator(gate_up_TF, low_TR, up_FR)


def swiglu_fp8_backward(
    grad_h_TI: Tensor,
    gate_up_TF: Tensor,
    low_TR: Tensor | None,
    up_FR: Tensor | None,
    dlow_TS: Tensor | None,
    down_SI: Tensor | None,
    want_h: bool,
    fold_F: Tensor | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """`swiglu_low_rank_backward`, and `quantize_rows_fp8` of the gradient with `fold_F` (float32 [2I]) folded in.

    Args: out: where the gradient is written; gate_up itself is allowed, no other overlap.
    Returns: the gradient [T, 2I] (`out` where given); h [T, I] or None; codes float8_e4m3fn [T, 2I]; scale float32
    [T, 1].
    """
    arguments = (grad_h_TI, gate_up_TF, low_TR, up_FR, dlow_TS, down_SI, want_h, fold_F, out)
    if not use_kernel(gate_up_TF.device):
        return swiglu_fp8_backward_reference(*arguments)
    from tunesmith.kernels.swiglu_fp8_triton import swiglu_fp8_backward_on_gpu

    return swiglu_fp8_backward_on_gpu(*arguments)


def swiglu_fp8_reference(
    gate_up_TF: Tensor, low_TR: Tensor | None, up_FR: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """swiglu_fp8 by plain torch, one after the other."""
    h_TI = swiglu_low_rank_reference(gate_up_TF, low_TR, up_FR)
    return h_TI, *quantize_rows_reference(h_TI)


def swiglu_fp8_backward_reference(
    grad_h_TI: Tensor,
    gate_up_TF: Tensor,
    low_TR: Tensor | None,
    up_FR: Tensor | None,
    dlow_TS: Tensor | None,
    down_SI: Tensor | None,
    want_h: bool,
    fold_F: Tensor | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """swiglu_fp8_backward by plain torch."""
    grad, h = swiglu_low_rank_backward_reference(grad_h_TI, gate_up_TF, low_TR, up_FR, dlow_TS, down_SI, want_h, out)
    return grad, h, *quantize_rows_reference(grad, fold_F)

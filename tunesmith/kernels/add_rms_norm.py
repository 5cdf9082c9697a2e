"""The residual stream and the norm behind it in one pass, for models that only answer.

    stream <- stream + delta;   y = stream / sqrt(mean(stream^2) + eps) * weight

A block of inference reads and writes the stream once between two products. Training keeps the sum and the norm apart
(kernels/rms_norm.py), since its backward pass wants the norm's statistics.
Source of the norm: arXiv 1910.07467, section 3.
"""

from __future__ import annotations

from torch import Tensor

from tunesmith.kernels.direct import direct
from tunesmith.kernels.nf4 import use_kernel
from tunesmith.kernels.rms_norm import rms_norm


def add_rms_norm_(stream_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """y_TD of the new stream, which is written over the old one.

    The sum is rounded to the stream's dtype before it is normed, as it is where both are apart.
    Args: stream_TD, delta_TD: contiguous, of one dtype.
    """
    if use_kernel(stream_TD.device):
        from tunesmith.kernels.add_rms_norm_triton import add_rms_norm_operator

        y_TD: Tensor = direct(add_rms_norm_operator, stream_TD)(stream_TD, delta_TD, weight_D, eps)
        return y_TD
    return add_rms_norm_reference_(stream_TD, delta_TD, weight_D, eps)


def add_rms_norm_reference_(stream_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """add_rms_norm_ by plain torch: the truth that the kernel must equal but for the order of the sum."""
    return rms_norm(stream_TD.add_(delta_TD), weight_D, eps)[0]

"""The inner product of every column of two activations, summed in float32 without their product being made.

It is the gradient of a factor that multiplies a column: with y[t, f] = s[f] * z[t, f], ds[f] = sum_t g[t, f] z[t, f].
"""

from __future__ import annotations

from torch import Tensor

from tunesmith.kernels.nf4 import use_kernel


def column_dot(left_TF: Tensor, right_TF: Tensor) -> Tensor:
    """sum_t left[t, f] * right[t, f], float32 [F], in an order that is the same in every run.

    Args: both two-dimensional and of one dtype; the last stride is 1.
    """
    if not use_kernel(left_TF.device):
        return column_dot_reference(left_TF, right_TF)
    from tunesmith.kernels.column_dot_triton import column_dot_operator

    return column_dot_operator(left_TF, right_TF)


def column_dot_reference(left_TF: Tensor, right_TF: Tensor) -> Tensor:
    """column_dot by plain torch: the truth that the kernel must equal but for the order of the sum."""
    return (left_TF.float() * right_TF.float()).sum(0)

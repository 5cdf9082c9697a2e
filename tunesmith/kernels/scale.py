"""A tensor multiplied in place by a number that only the device knows, in float32 with one rounding.

torch would either round the number to the tensor's dtype first (a factor of no dimension takes no part in the choice of
the dtype), which puts every value off by the same share, or, where both count, go through its slow kernel for mixed
dtypes: 1.3 ms for the gradient of a head of 152,064 x 3,584 in bfloat16, whose bytes take 0.5 on an H200.
"""

from __future__ import annotations

from torch import Tensor

from tunesmith.kernels.nf4 import use_kernel


def scale_(values: Tensor, factor: Tensor) -> None:
    """values *= factor. Args: factor: float32, one value, on the same device."""
    if use_kernel(values.device) and values.is_contiguous():
        from tunesmith.kernels.scale_triton import scale_operator

        scale_operator(values, factor)
    else:
        scale_reference_(values, factor)


def scale_reference_(values: Tensor, factor: Tensor) -> None:
    """`scale_` by plain torch: the truth that the kernel must equal."""
    values.mul_(factor.reshape([1] * values.dim()))

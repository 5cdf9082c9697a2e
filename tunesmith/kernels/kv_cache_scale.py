"""The scale of a page of fp8 (e4m3): a power of two, from the bits of the largest magnitude."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-100
"""The scale of a page of zeros."""
MANTISSA_ABOVE_448 = 0x1FFFFF
"""Added to the bits of a float32 it carries into the exponent where the mantissa is above 1.75: 448 is 1.75 * 2^8."""
EXPONENT = 0x7F800000
EXPONENT_OF_448 = 8 << 23


def power_of_two_scale(largest: Tensor) -> Tensor:
    """The least power of two p, at least SMALLEST_SCALE, with largest <= 448 p; float32 of largest's shape."""
    bits = largest.contiguous().view(torch.int32)
    exponent = (bits + MANTISSA_ABOVE_448).bitwise_and(EXPONENT)
    scale = (exponent - EXPONENT_OF_448).clamp(min=0).view(torch.float32)
    return scale.clamp(min=SMALLEST_SCALE)

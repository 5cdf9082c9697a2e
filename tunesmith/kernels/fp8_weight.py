"""An fp8 weight as it is held, and the format's constants: what the operations and their kernels share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.units import ceil_div

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# torch's fp8 product takes widths that are multiples of this.
ALIGNMENT = 16


@dataclass(frozen=True)
class Fp8Weight:
    """A weight [F, D] in fp8: weight[f, d] = codes[f, d] * scale[f].

    codes: [F, D], or [D, F] where it was made transposed; scale: float32 [F] either way.
    dtype: what the weight was, and is dequantised to unless told otherwise.
    """

    codes: Tensor
    scale: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes held, scales included."""
        return self.codes.nbytes + self.scale.nbytes


def padded(count: int) -> int:
    """The least width of an fp8 product that holds so many values."""
    return max(1, ceil_div(count, ALIGNMENT)) * ALIGNMENT

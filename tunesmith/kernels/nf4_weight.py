"""An NF4 weight as it is held: what the codec and its kernel share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
SCALE_BLOCK = 256


@dataclass(frozen=True)
class NF4Weight:
    """A quantised [F, D] weight.

    codes: uint8 [F, D / 2] (flat, rounded up, where D is odd).
    scales: float32 [F * D / 64], or uint8 when they are doubly quantised; then `scale_scales` (float32, one for 256)
    and `offset` (float32 scalar) undo that.
    dtype: what the weight was; it is dequantised to this dtype before any other.
    """

    codes: Tensor
    scales: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    scale_scales: Tensor | None = None
    offset: Tensor | None = None

    @property
    def is_double(self) -> bool:
        """Whether the scales are quantised too."""
        return self.scale_scales is not None

    @property
    def num_bytes(self) -> int:
        """Bytes held, scales of both levels included."""
        held = (self.codes, self.scales, self.scale_scales, self.offset)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

"""What the linears of inference formats share: the face of `Linear`, a frozen weight held in codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.model.fp8 import Fp8Linear


class HeldLinear(Fp8Linear):
    """Projections of one input whose frozen weight is held in codes: y_TF = x_TD @ weight_FD.T + bias_F.

    It stands where an `Fp8Linear` stands: adapters go on it, the written-out blocks take it, and its buffers are moved
    but never converted. A subclass holds its codes in buffers and has `load_part`, `part_weight` and `product`.
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        bias: bool,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.parts = dict(parts)
        self.out_features = sum(parts.values())
        self.dtype = dtype
        self.compute: Literal["weights", "fp8"] = "weights"
        self.shell: tuple[nn.Module] | None = None
        self.bias = nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device)) if bias else None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight as held, scales included, the bias not."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dequantised fused weight_FD."""
        return torch.cat([self.part_weight(part, dtype) for part in self.parts])

    def dense_product(self, x_TD: Tensor) -> Tensor:
        """The product with the dequantised weight, in the dtype of x: of many tokens the fastest, and the reference."""
        return F.linear(x_TD, self.weight(x_TD.dtype), None if self.bias is None else self.bias.to(x_TD.dtype))

    def input_grad(self, g_TF: Tensor) -> Tensor:
        """dx_TD = g @ weight in the dtype of g."""
        return g_TF @ self.weight(g_TF.dtype)

    def _take_bias(self, part: str, bias_F: Tensor | None) -> None:
        if bias_F is not None and self.bias is not None:
            self.bias[self.rows(part)].copy_(bias_F)

    def _check_shape(self, part: str, shape: tuple[int, ...]) -> None:
        expected = (self.parts[part], self.in_features)
        if tuple(shape) != expected:
            raise ValueError(f"{part} must have shape {expected}, got {tuple(shape)}")

"""Norms, rotary positions and linears: the parts of a block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.arch import ModelConfig, RopeConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32. Source: arXiv 1910.07467, section 3."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return scaled.to(x.dtype) * self.weight.to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias, computed in float32. Source: arXiv 1607.06450, section 3."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), weight.shape, weight, bias, self.eps).to(x.dtype)


def make_norm(config: ModelConfig, size: int) -> nn.Module:
    """The norm this configuration uses, over the last dimension of length `size`."""
    return (RMSNorm if config.norm == "rms" else LayerNorm)(size, config.norm_eps)


class LinearLike(Protocol):
    """What a block calls: anything put in place of a linear (dense, quantised, adapted) has this face."""

    in_features: int
    parts: Mapping[str, int]

    def __call__(self, x_TD: Tensor) -> Tensor: ...


class Linear(nn.Module):
    """Projections of one input, held fused: y_TF = x_TD @ weight_FD.T + bias_F in the dtype of x.

    `parts` names the projections and their output features in order ({"q_proj": 64, "k_proj": 32, "v_proj": 32});
    Hugging Face's per-projection tensors and adapters are slices of rows, by `rows`.
    The weight may be held in a wider dtype (a float32 master): it is cast at use, so its gradient arrives wide.
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.parts = dict(parts)
        self.out_features = sum(parts.values())
        self.weight = nn.Parameter(torch.empty(self.out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(self.out_features)) if bias else None

    def rows(self, part: str) -> slice:
        """The rows of the fused weight that belong to one projection."""
        return part_rows(self.parts, part)

    @torch.no_grad()
    def load_part(self, part: str, weight_FD: Tensor, bias_F: Tensor | None = None) -> None:
        """Take over one projection's weight (and bias), converted to the dtype and device held here."""
        rows = self.rows(part)
        self.weight[rows].copy_(weight_FD)
        if bias_F is not None and self.bias is not None:
            self.bias[rows].copy_(bias_F)

    def part_weight(self, part: str) -> Tensor:
        """weight_FD of one projection (a view)."""
        return self.weight[self.rows(part)]

    def product(self, x_TD: Tensor) -> Tensor:
        """y_TF = x @ weight.T + bias in the dtype of x: what `forward` computes."""
        bias = None if self.bias is None else self.bias.to(x_TD.dtype)
        return F.linear(x_TD, self.weight.to(x_TD.dtype), bias)

    def input_grad(self, g_TF: Tensor) -> Tensor:
        """dx_TD = g @ weight in the dtype of g: the gradient of `product` to x, for backward passes written out."""
        return g_TF @ self.weight.to(g_TF.dtype)

    def weight_grad(self, g_TF: Tensor, x_TD: Tensor) -> Tensor:
        """dW_FD = g.T @ x in the dtype of g: the gradient of `product` to the weight."""
        return g_TF.t() @ x_TD

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.product(x_TD)


def part_rows(parts: Mapping[str, int], part: str) -> slice:
    """The rows of a fused weight that belong to the projection `part`."""
    start = 0
    for name, size in parts.items():
        if name == part:
            return slice(start, start + size)
        start += size
    raise KeyError(part)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Inverse frequencies, float32 [H / 2], after the configured scaling.

    Source: arXiv 2104.09864, section 3.4.2; Llama 3's scaling as published with Llama 3.1 (wavelengths longer than the
    original context divided by `factor`, a linear ramp between `low_freq_factor` and `high_freq_factor`).
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inverse = 1.0 / (rope.theta**exponent)
    if rope.scaling is None:
        return inverse
    factor = float(rope.scaling["factor"])
    if rope.scaling["rope_type"] == "linear":
        return inverse / factor
    low, high = float(rope.scaling["low_freq_factor"]), float(rope.scaling["high_freq_factor"])
    original = float(rope.scaling["original_max_position_embeddings"])
    turns = original * inverse / (2 * math.pi)
    ramp = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - ramp) * inverse / factor + ramp * inverse


def rope_tables(inverse: Tensor, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [T, 1, H], for both halves of the head."""
    angles = positions_T.float()[:, None] * inverse[None, :]
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x_TNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + H/2) of every head by its position's angle."""
    first, second = x_TNH.chunk(2, dim=-1)
    return x_TNH * cos + torch.cat((-second, first), dim=-1) * sin


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}

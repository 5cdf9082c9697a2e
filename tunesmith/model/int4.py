"""Linears whose weight is held in int4 by groups of columns, as quantised here or by GPTQ or AWQ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tunesmith.kernels.gemv import int4_product
from tunesmith.kernels.int4 import Int4Weight, check_group, dequantize_int4, empty_int4, quantize_int4
from tunesmith.kernels.int4_cpu import CpuInt4, pack_for_cpu
from tunesmith.model.held import HeldLinear


class Int4Linear(HeldLinear):
    """Projections of one input in int4, held fused.

    `order` (None: as they are): the column of the input that each held column is of; GPTQ sorts them ("act-order").
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        bias: bool,
        *,
        group_size: int = 128,
        symmetric: bool = False,
        ordered: bool = False,
        scale_dtype: torch.dtype = torch.bfloat16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, parts, bias, dtype=dtype, device=device)
        check_group(group_size)
        self.group_size, self.symmetric = group_size, symmetric
        shape = (self.out_features, in_features)
        empty = empty_int4(shape, dtype, group_size, symmetric, scale_dtype=scale_dtype, device=device)
        self.register_buffer("words", empty.words)
        self.register_buffer("scales", empty.scales)
        self.register_buffer("zeros", empty.zeros)
        self.register_buffer("order", torch.arange(in_features, device=device) if ordered else None)
        self._cpu: CpuInt4 | None = None

    @torch.no_grad()
    def load_part(self, part: str, weight_FD: Tensor | Int4Weight, bias_F: Tensor | None = None) -> None:
        """Quantise one projection's weight on the device it is on, or take over a quantised one; take over its bias."""
        held = weight_FD
        if isinstance(held, Tensor):
            held = held.to(self.dtype)
            held = held if self.order is None else held[:, self.order]
            held = quantize_int4(held, self.group_size, self.symmetric)
        self._check_shape(part, held.shape)
        rows = self.rows(part)
        self.words[rows].copy_(held.words)
        self.scales[rows].copy_(held.scales)
        if self.zeros is not None and held.zeros is not None:
            self.zeros[rows].copy_(held.zeros)
        if self.order is not None and held.order is not None:
            self.order.copy_(held.order)
        self._cpu = None
        self._take_bias(part, bias_F)

    @property
    def held(self) -> Int4Weight:
        """The fused weight as it is held, its columns in the held order."""
        return Int4Weight(self.words, self.scales, self.zeros, (self.out_features, self.in_features), self.dtype)

    def part_held(self, part: str) -> Int4Weight:
        """One projection as it is held (views)."""
        rows = self.rows(part)
        zeros = None if self.zeros is None else self.zeros[rows]
        shape = (self.parts[part], self.in_features)
        return replace(self.held, words=self.words[rows], scales=self.scales[rows], zeros=zeros, shape=shape)

    def part_weight(self, part: str, dtype: torch.dtype | None = None) -> Tensor:
        """The dequantised weight_FD of one projection, in `dtype` (None: that of the weights quantised)."""
        return self._in_order(dequantize_int4(self.part_held(part), dtype))

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dequantised fused weight_FD."""
        return self._in_order(dequantize_int4(self.held, dtype))

    def product(self, x_TD: Tensor) -> Tensor:
        """y_TF = x @ weight.T + bias in the dtype of x, without gradients."""
        flat = x_TD.flatten(0, -2)
        flat = flat if self.order is None else flat[:, self.order]
        y_TF = int4_product(flat, self.held, self.bias, self._for_cpu())
        return y_TF.view(*x_TD.shape[:-1], self.out_features)

    def _in_order(self, held_FD: Tensor) -> Tensor:
        """The columns where the input has them."""
        if self.order is None:
            return held_FD
        out = torch.empty_like(held_FD)
        out[:, self.order] = held_FD
        return out

    def _for_cpu(self) -> CpuInt4 | None:
        """The form that torch's CPU kernel takes, made at the first product and kept beside the codes."""
        if self.words.device.type != "cpu":
            return None
        if self._cpu is None:
            self._cpu = pack_for_cpu(self.held)
        return self._cpu

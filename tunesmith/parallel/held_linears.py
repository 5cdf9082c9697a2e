"""Quantised linears of which a process holds a part, and what their products must ask of the other processes.

A product in int8 or fp8 rounds each row of its input by the largest of the row. Where the columns are shared, a
process sees a part of the row only: the largest is agreed upon first (one small message), so that the codes are those
that one process would have made. Sums over the columns are then parts of the same sum.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.kernels.fp8 import fp8_product, row_scale, to_codes
from tunesmith.kernels.gemv import int4_product, takes
from tunesmith.kernels.int4 import Int4Weight, dequantize_int4, quantize_int4
from tunesmith.kernels.int8 import Int8Weight, int8_integer_product, quantize_int8
from tunesmith.model.decode_linears import FP8_WEIGHT_TOKENS, DecodeFp8Linear, adopted
from tunesmith.model.fp8 import Fp8Linear
from tunesmith.model.held import HeldLinear
from tunesmith.model.int4 import Int4Linear
from tunesmith.model.int8 import Int8Linear
from tunesmith.parallel.collectives import Team
from tunesmith.parallel.held_shares import cut_int4, cut_int8, share_group
from tunesmith.parallel.placement import Shard
from tunesmith.parallel.shard_linears import Cut, is_cut


def largest_of_rows(x_TD: Tensor, team: Team) -> Tensor:
    """The largest magnitude of every row over the columns of all processes, float32 [T, 1]."""
    largest_T1 = x_TD.float().abs().amax(dim=1, keepdim=True)
    torch.distributed.all_reduce(largest_T1, op=torch.distributed.ReduceOp.MAX, group=team.group)
    return largest_T1


class ColumnsInt8Linear(Int8Linear):
    """W8A8 of a process's columns."""

    cut: Cut

    def product(self, x_TD: Tensor) -> Tensor:
        """This process's part of y_TF, in the dtype of x."""
        flat = x_TD.flatten(0, -2)
        largest_T1 = largest_of_rows(flat, self.cut.team)
        y_TF = int8_integer_product(flat, self.codes, self.scale, self.bias, largest_T1)
        return y_TF.view(*x_TD.shape[:-1], self.out_features)


class ColumnsFp8Linear(DecodeFp8Linear):
    """An fp8 linear of a process's columns."""

    cut: Cut

    def product(self, x_TD: Tensor) -> Tensor:
        """This process's part of y_TF, in the dtype of x."""
        flat = x_TD.flatten(0, -2)
        if self.compute != "fp8" or (takes("fp8", flat) and flat.shape[0] <= FP8_WEIGHT_TOKENS):
            return super().product(x_TD)
        scale_T1 = row_scale(largest_of_rows(flat, self.cut.team))
        y_TF = fp8_product(to_codes(flat.float(), scale_T1), scale_T1, self.codes, self.scale, self.bias, x_TD.dtype)
        return y_TF.view(*x_TD.shape[:-1], self.out_features)


class ColumnsInt4Linear(Int4Linear):
    """int4 of a process's columns of one projection; how they are grouped and sorted comes with the weight."""

    held_features: int

    @torch.no_grad()
    def load_part(self, part: str, weight_FD: Tensor | Int4Weight, bias_F: Tensor | None = None) -> None:
        """Take over the columns as they were cut; take over the bias."""
        assert isinstance(weight_FD, Int4Weight)
        self.group_size, self.held_features = weight_FD.group_size, weight_FD.shape[1]
        for name in ("words", "scales", "zeros", "order"):
            self.register_buffer(name, getattr(weight_FD, name))
        self._cpu = None
        self._take_bias(part, bias_F)

    @property
    def held(self) -> Int4Weight:
        """The columns as they are held: where they are sorted, more than there are."""
        return Int4Weight(self.words, self.scales, self.zeros, (self.out_features, self.held_features), self.dtype)

    def part_held(self, part: str) -> Int4Weight:
        """The one projection."""
        return self.held

    def product(self, x_TD: Tensor) -> Tensor:
        """This process's part of y_TF, in the dtype of x."""
        flat = x_TD.flatten(0, -2)
        flat = flat if self.order is None else F.pad(flat, (0, 1))[:, self.order]
        y_TF = int4_product(flat, self.held, self.bias, self._for_cpu())
        return y_TF.view(*x_TD.shape[:-1], self.out_features)

    def weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dequantised weight_FD."""
        return self._in_order(dequantize_int4(self.held, dtype))

    def _in_order(self, held_FD: Tensor) -> Tensor:
        if self.order is None:
            return held_FD
        out = held_FD.new_zeros(held_FD.shape[0], self.in_features + 1)
        out[:, self.order] = held_FD
        return out[:, : self.in_features].contiguous()


def share_of(whole: HeldLinear, linear: nn.Module, path: str) -> HeldLinear:
    """An empty linear in the form of `whole`, of the sizes that `linear`, a part of a whole, has; both on "meta".

    Raises: ParallelError where columns can't be cut.
    """
    known = cast(Any, linear)
    shard: Shard = known.cut.shard
    by_columns = shard.kind == "columns"
    sizes = (known.in_features, known.parts, whole.bias is not None)
    common: dict[str, Any] = {"dtype": whole.dtype, "device": "meta"}
    if isinstance(whole, Int4Linear):
        if by_columns and whole.order is None:
            share_group(whole.group_size, shard, path)
        out: HeldLinear = (ColumnsInt4Linear if by_columns else Int4Linear)(
            *sizes,
            group_size=whole.group_size,
            symmetric=whole.symmetric,
            ordered=whole.order is not None,
            scale_dtype=whole.scales.dtype,
            **common,
        )
    elif isinstance(whole, Int8Linear):
        form = ColumnsInt8Linear if by_columns and whole.has_int8_products else Int8Linear
        out = form(*sizes, has_int8_products=whole.has_int8_products, **common)
    else:
        raise TypeError(f"{path} is a {type(whole).__name__}")
    cast(Any, out).cut = known.cut
    return out


@torch.no_grad()
def load_share_of(
    linear: HeldLinear, part: str, weight: Tensor | Int8Weight | Int4Weight, bias_F: Tensor | None
) -> None:
    """Take over this process's part of one projection of the whole, which is quantised as a whole."""
    cut: Cut = cast(Any, linear).cut
    shard = cut.shard
    if bias_F is not None and shard.kind == "columns":
        bias_F = torch.zeros_like(bias_F) if shard.index else bias_F  # the outputs are summed
    elif bias_F is not None:
        bias_F = torch.cat([bias_F[start:stop] for start, stop in shard.rows(part)])
    if isinstance(linear, Int4Linear):
        held4 = weight if isinstance(weight, Int4Weight) else None
        if held4 is None:
            assert isinstance(weight, Tensor)
            held4 = quantize_int4(weight.to(linear.dtype), linear.group_size, linear.symmetric)
        linear.load_part(part, cut_int4(held4, shard, part), bias_F)
    elif isinstance(linear, Int8Linear):
        held8 = weight if isinstance(weight, Int8Weight) else None
        if held8 is None:
            assert isinstance(weight, Tensor)
            held8 = quantize_int8(weight.to(linear.dtype))
        linear.load_part(part, cut_int8(held8, shard, part), bias_F)


def agree_on_rows(model: nn.Module) -> None:
    """Let fp8 linears that hold columns of a whole round their input as one process does."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            is_fp8 = isinstance(child, Fp8Linear) and not isinstance(child, HeldLinear)
            if is_fp8 and is_cut(child) and cast(Any, child).cut.shard.kind == "columns":
                setattr(parent, name, adopted(ColumnsFp8Linear, child))

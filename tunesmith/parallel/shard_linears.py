"""Linears cut in place to a process's rows or columns, whatever holds the weight, and adapters with them.

A linear keeps its place, its kind and its parameters' names; only the sizes are a process's own.

                   by rows (qkv, gate-up)          by columns (output, down)
    weight         rows of every projection        columns
    bias           as the weight                   whole in the first process, zeros that stay in the others: the
                                                   outputs are summed
    adapter        A whole, B and magnitude rows   A columns, B and magnitude whole
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.errors import ParallelError
from tunesmith.kernels.fp8 import quantize_fp8_weight
from tunesmith.kernels.nf4 import BLOCK, NF4Weight, dequantize_nf4, plain_scales, quantize_nf4
from tunesmith.model.fp8 import Fp8Linear
from tunesmith.model.layers import Linear
from tunesmith.model.lora import AdaptedLinear
from tunesmith.model.quant import NF4Linear
from tunesmith.parallel.collectives import Team
from tunesmith.parallel.placement import Range, Shard


@dataclass(frozen=True)
class Cut:
    """What a cut linear remembers of the whole: adapters are made for that, and cut afterwards."""

    shard: Shard
    team: Team

    @property
    def parts(self) -> dict[str, int]:
        """The rows of every projection of the whole."""
        return dict(self.shard.parts)

    @property
    def in_features(self) -> int:
        """The columns of the whole."""
        return self.shard.in_features

    def whole_norms(self, norm_F: Tensor) -> Tensor:
        """The norms of the rows of the whole, given those of what is held."""
        if self.shard.kind == "columns":
            return self.team.summed(norm_F.square()).sqrt()
        whole = norm_F.new_zeros(sum(self.parts.values()))
        held = [torch.arange(start, stop) for start, stop in self.shard.fused_rows()]
        whole[torch.cat(held).to(whole.device)] = norm_F
        return self.team.summed(whole)


def shard_linear(linear: nn.Module, shard: Shard, team: Team, path: str) -> None:
    """Keep this process's part; adapters are left as they are. Raises: ParallelError where that can't be cut."""
    if isinstance(linear, NF4Linear):
        _shard_nf4(linear, shard, path)
    elif isinstance(linear, Fp8Linear):
        _shard_fp8(linear, shard)
    elif isinstance(linear, Linear):
        _shrink(linear.weight, _cut(linear.weight, shard.fused_rows(), shard.columns))
    else:
        raise ParallelError(f"{path} is a {type(linear).__name__}, which can't be shared: set parallel.tensor to 1")
    _shard_bias(linear, shard)
    linear.parts = shard.own_parts
    linear.in_features, linear.out_features = shard.own_in_features, sum(shard.own_parts.values())
    cast(Any, linear).cut = Cut(shard, team)


def shard_adapters(linear: AdaptedLinear, shard: Shard, team: Team) -> None:
    """Keep this process's part of whole adapters."""
    if linear.is_dora and shard.kind == "columns":
        linear.sum_squares = team.sum_
    for part in linear.adapters:
        adapter, rows = linear.adapter(part), shard.rows(part)
        _shrink(adapter.A, _cut(adapter.A, [(0, adapter.A.shape[0])], shard.columns))
        _shrink(adapter.B, _cut(adapter.B, rows, (0, adapter.B.shape[1])))
        if adapter.magnitude is not None:
            _shrink(adapter.magnitude, _rows(adapter.magnitude, rows))
    linear.parts = shard.own_parts
    linear.in_features, linear.out_features = shard.own_in_features, sum(shard.own_parts.values())


def _shard_nf4(linear: NF4Linear, shard: Shard, path: str) -> None:
    held = {part: linear.part_nf4(part) for part in linear.parts}
    linear.parts, linear.in_features = shard.own_parts, shard.own_in_features
    for part, weight in held.items():
        linear.load_quantised(part, cut_nf4(weight, shard.rows(part), shard.columns, f"{path}.{part}"))


def cut_nf4(weight: NF4Weight, rows: Sequence[Range], columns: Range, name: str) -> NF4Weight:
    """Rows, or columns, of an NF4 weight with plain scales: the same values bit for bit.

    Raises: ParallelError where a block of 64 values, which share a scale, would be cut.
    """
    width = weight.shape[1]
    if columns != (0, width):
        return _nf4_columns(weight, columns, name)
    starts = [bound * width for span in rows for bound in span]
    if any(start % BLOCK for start in starts):
        raise _torn_block(name, f"rows of {width} values", width * (rows[0][1] - rows[0][0]))
    codes, scales = weight.codes.view(-1), plain_scales(weight)
    spans = [(start * width, stop * width) for start, stop in rows]
    shape = (sum(stop - start for start, stop in rows), width)
    return replace(
        weight,
        codes=_rows(codes, [(start // 2, stop // 2) for start, stop in spans]).view(_code_shape(shape)),
        scales=_rows(scales, [(start // BLOCK, stop // BLOCK) for start, stop in spans]),
        shape=shape,
        scale_scales=None,
        offset=None,
    )


def _nf4_columns(weight: NF4Weight, columns: Range, name: str) -> NF4Weight:
    (height, width), (start, stop) = weight.shape, columns
    if width % BLOCK or start % BLOCK or stop % BLOCK:
        raise _torn_block(name, "columns", stop - start)
    scales = plain_scales(weight).view(height, width // BLOCK)[:, start // BLOCK : stop // BLOCK]
    return replace(
        weight,
        codes=weight.codes.view(height, width // 2)[:, start // 2 : stop // 2].clone(),
        scales=scales.reshape(-1).clone(),
        shape=(height, stop - start),
        scale_scales=None,
        offset=None,
    )


def _code_shape(shape: tuple[int, int]) -> tuple[int, ...]:
    return (shape[0] * shape[1] // 2,) if shape[1] % 2 else (shape[0], shape[1] // 2)


def _torn_block(name: str, what: str, got: int) -> ParallelError:
    return ParallelError(
        f"{name} is held in NF4, and a share of its {what} is {got} values, not a multiple of {BLOCK}: set "
        f"parallel.tensor to a smaller number, or method.kind to lora"
    )


def _shard_fp8(linear: Fp8Linear, shard: Shard) -> None:
    """A row keeps the scale of the whole row."""
    linear.codes = _cut(linear.codes, shard.fused_rows(), shard.columns)
    linear.scale = _rows(linear.scale, shard.fused_rows())


def _shard_bias(linear: Linear | NF4Linear | Fp8Linear, shard: Shard) -> None:
    if linear.bias is None:
        return
    if shard.kind == "rows":
        _shrink(linear.bias, _rows(linear.bias, shard.fused_rows()))
    elif shard.index:
        linear.bias.data = torch.zeros_like(linear.bias)


def is_cut(module: nn.Module) -> bool:
    """Whether a linear is a part of a whole."""
    return getattr(module, "cut", None) is not None


@torch.no_grad()
def load_part(
    linear: nn.Module,
    part: str,
    weight: Tensor | NF4Weight,
    bias_F: Tensor | None,
    double: bool,
) -> None:
    """Take over this process's part of one projection of the whole, quantised as the whole is; `linear` is cut.

    Args: double: NF4: the scales are doubly quantised where the weight is whole.
    """
    shard: Shard = cast(Any, linear).cut.shard
    assert isinstance(linear, Linear | NF4Linear | Fp8Linear)
    rows = linear.rows(part)
    if bias_F is not None and linear.bias is not None:
        is_idle = shard.kind == "columns" and shard.index > 0
        linear.bias[rows].copy_(torch.zeros_like(bias_F) if is_idle else _rows(bias_F, shard.rows(part)))
    if isinstance(linear, NF4Linear):
        held = weight if isinstance(weight, NF4Weight) else quantize_nf4(weight.to(linear.dtype), double)
        linear.load_quantised(part, cut_nf4(held, shard.rows(part), shard.columns, part))
        return
    dense = dequantize_nf4(weight) if isinstance(weight, NF4Weight) else weight
    if isinstance(linear, Fp8Linear):
        quantised = quantize_fp8_weight(dense.to(linear.dtype))
        linear.codes[rows].copy_(_cut(quantised.codes, shard.rows(part), shard.columns))
        linear.scale[rows].copy_(_rows(quantised.scale, shard.rows(part)))
    else:
        linear.load_part(part, _cut(dense, shard.rows(part), shard.columns))


def _shrink(parameter: nn.Parameter, part: Tensor) -> None:
    parameter.data = part


@torch.no_grad()
def _cut(tensor_FD: Tensor, rows: Sequence[Range], columns: Range) -> Tensor:
    """A tensor of its own, so that the whole can be let go."""
    return _rows(tensor_FD[:, columns[0] : columns[1]], rows)


@torch.no_grad()
def _rows(tensor: Tensor, rows: Sequence[Range]) -> Tensor:
    parts = [tensor[start:stop] for start, stop in rows]
    joined = parts[0].clone(memory_format=torch.contiguous_format) if len(parts) == 1 else torch.cat(parts)
    return joined.detach()

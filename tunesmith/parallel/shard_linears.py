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
from dataclasses import replace

import torch
from torch import Tensor, nn

from tunesmith.errors import ParallelError
from tunesmith.kernels.nf4 import BLOCK, NF4Weight, plain_scales
from tunesmith.model.fp8 import Fp8Linear
from tunesmith.model.layers import Linear
from tunesmith.model.lora import AdaptedLinear
from tunesmith.model.quant import NF4Linear
from tunesmith.parallel.placement import Range, Shard


def shard_linear(linear: nn.Module, shard: Shard, path: str) -> None:
    """Keep this process's part. Raises: ParallelError where that can't be cut."""
    if isinstance(linear, AdaptedLinear):
        _shard_adapters(linear, shard)
        linear = linear.base
    if isinstance(linear, NF4Linear):
        _shard_nf4(linear, shard, path)
    elif isinstance(linear, Fp8Linear):
        _shard_fp8(linear, shard)
    elif isinstance(linear, Linear):
        _shrink(linear.weight, _cut(linear.weight, shard.fused_rows(), shard.columns))
    else:
        raise ParallelError(f"{path} is a {type(linear).__name__}, which can't be shared: set parallel.tensor to 1")
    _shard_bias(linear, shard)
    _resize(linear, shard)


def _shard_adapters(linear: AdaptedLinear, shard: Shard) -> None:
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
        linear.bias.requires_grad_(False)
        linear.bias.data = torch.zeros_like(linear.bias)


def _resize(linear: Linear | NF4Linear | Fp8Linear, shard: Shard) -> None:
    linear.parts = shard.own_parts
    linear.in_features, linear.out_features = shard.own_in_features, sum(shard.own_parts.values())


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

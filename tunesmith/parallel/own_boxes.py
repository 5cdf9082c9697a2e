"""What a process must read of a projection that it shares, and how that becomes its part: the values of the whole.

                             by rows (qkv, gate-up)    by columns (output, down)
dense, NF4                   its rows                  its columns
int4                         its rows                  its columns, and those that share a group with them
fp8, int8                    its rows                  all columns, some rows at a time: a row has one scale
NF4 with quantised scales    everything, some rows at a time: what is taken off the scales is the mean of all

What is read whole is quantised as it comes, and only this process's part of the codes is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.kernels.fp8 import quantize_fp8_weight
from tunesmith.kernels.int4 import Int4Weight, quantize_int4
from tunesmith.kernels.int8 import Int8Weight, quantize_int8
from tunesmith.kernels.nf4 import BLOCK, NF4Weight, double_quantize, plain_scales, quantize_nf4
from tunesmith.model.fp8 import Fp8Linear
from tunesmith.model.int4 import Int4Linear
from tunesmith.model.int8 import Int8Linear
from tunesmith.model.quant import NF4Linear
from tunesmith.parallel.held_shares import cut_columns, share_group
from tunesmith.parallel.placement import Range, Shard
from tunesmith.parallel.shard_linears import cut_nf4

Rectangle = tuple[Range, Range]
"""Rows and columns of a projection [out, in]."""
VALUES_AT_ONCE = 2**24
"""Of a projection that must be read whole."""


def own_boxes(linear: nn.Module, part: str, double: bool) -> list[Rectangle]:
    """What has to be read of one projection's weight, in order; `linear` is this process's part of a whole.

    Args: double: the scales of NF4 are quantised where the weight is whole.
    """
    shard = _shard(linear)
    all_columns, by_columns = (0, shard.in_features), shard.kind == "columns"
    if isinstance(linear, NF4Linear):
        if double:
            return _in_blocks(shard, part, BLOCK // math.gcd(BLOCK, shard.in_features))
    elif isinstance(linear, Int4Linear):
        if by_columns:
            return [((0, shard.parts[part]), _whole_groups(shard, linear.group_size))]
    elif isinstance(linear, Fp8Linear) and by_columns:
        return _in_blocks(shard, part, 1)
    columns = shard.columns if by_columns else all_columns
    return [(rows, columns) for rows in shard.rows(part)]


@torch.no_grad()
def load_boxes(
    linear: nn.Module, part: str, read: Callable[[Rectangle], Tensor], bias_F: Tensor | None, double: bool
) -> None:
    """Take over this process's part of one projection, of which `read` gives the boxes that `own_boxes` names.

    bias_F: of the whole.
    """
    known = cast(Any, linear)
    shard, boxes = _shard(linear), own_boxes(linear, part, double)
    is_held = isinstance(linear, NF4Linear | Fp8Linear)

    def dense(box: Rectangle) -> Tensor:
        return read(box).to(known.dtype) if is_held else read(box)

    bias_F = _own_bias(bias_F, shard, part)
    if isinstance(linear, NF4Linear):
        blocks = ((box[0], dense(box)) for box in boxes)
        held = _nf4_of(blocks, shard, part) if double else quantize_nf4(_below(boxes, dense), False)
        linear.load_quantised(part, held, bias_F)
    elif isinstance(linear, Int4Linear) and shard.kind == "columns":
        linear.load_part(part, _int4_of(dense(boxes[0]), boxes[0][1][0], linear, shard, part), bias_F)
    elif isinstance(linear, Int8Linear) and shard.kind == "columns":
        linear.load_part(part, _int8_of((dense(box) for box in boxes), shard.columns), bias_F)
    elif isinstance(linear, Fp8Linear) and shard.kind == "columns":
        rows = linear.rows(part)
        for (first, last), _ in boxes:
            quantised = quantize_fp8_weight(dense(((first, last), (0, shard.in_features))))
            own = slice(rows.start + first, rows.start + last)
            linear.codes[own].copy_(quantised.codes[:, slice(*shard.columns)])
            linear.scale[own].copy_(quantised.scale)
        if bias_F is not None and linear.bias is not None:
            linear.bias[rows].copy_(bias_F)
    else:
        known.load_part(part, _below(boxes, dense), bias_F)


def _below(boxes: Sequence[Rectangle], read: Callable[[Rectangle], Tensor]) -> Tensor:
    """What is in these boxes, below each other."""
    return read(boxes[0]) if len(boxes) == 1 else torch.cat([read(box) for box in boxes])


def _own_bias(bias_F: Tensor | None, shard: Shard, part: str) -> Tensor | None:
    """Where outputs are summed, the first process has the bias."""
    if bias_F is None or (shard.kind == "columns" and not shard.index):
        return bias_F
    if shard.kind == "columns":
        return torch.zeros_like(bias_F)
    return torch.cat([bias_F[start:stop] for start, stop in shard.rows(part)])


def _shard(linear: nn.Module) -> Shard:
    shard: Shard = cast(Any, linear).cut.shard
    return shard


def _in_blocks(shard: Shard, part: str, step: int) -> list[Rectangle]:
    """All rows, so many at a time that they are a multiple of `step`, and few enough."""
    total, width = shard.parts[part], shard.in_features
    at_once = max(step, VALUES_AT_ONCE // width // step * step)
    return [((first, min(first + at_once, total)), (0, width)) for first in range(0, total, at_once)]


def _whole_groups(shard: Shard, group: int) -> Range:
    start, stop = shard.columns
    return start // group * group, min(-(-stop // group) * group, shard.in_features)


def _int4_of(dense_FD: Tensor, first: int, linear: Int4Linear, shard: Shard, part: str) -> Int4Weight:
    """Of columns that begin with the whole's column `first`."""
    held = quantize_int4(dense_FD, linear.group_size, linear.symmetric)
    start, stop = shard.columns
    return cut_columns(held, (start - first, stop - first), share_group(linear.group_size, shard, part))


def _int8_of(blocks: Iterator[Tensor], columns: Range) -> Int8Weight:
    codes, scales = [], []
    for block in blocks:
        held = quantize_int8(block)
        codes.append(held.codes[:, slice(*columns)].clone())
        scales.append(held.scale)
    return Int8Weight(torch.cat(codes), torch.cat(scales), torch.float32)


def _nf4_of(blocks: Iterator[tuple[Range, Tensor]], shard: Shard, part: str) -> NF4Weight:
    """This process's part with plain scales, whose values are those of the whole's quantised ones."""
    wanted, columns = shard.rows(part), shard.columns
    codes, scales, dtype = [], [], torch.float32
    for (first, last), block in blocks:
        held = quantize_nf4(block, False)
        dtype = held.dtype
        scales.append(held.scales)
        here = [(max(start, first) - first, min(stop, last) - first) for start, stop in wanted]
        rows = [span for span in here if span[0] < span[1]]
        if rows:
            codes.append(cut_nf4(held, rows, columns, part).codes)
    height = shard.parts[part]
    whole = NF4Weight(codes[0], torch.cat(scales), (height, shard.in_features), dtype)
    plain = plain_scales(double_quantize(whole))
    shape = (sum(stop - start for start, stop in wanted), columns[1] - columns[0])
    return replace(whole, codes=torch.cat(codes), scales=_own_scales(plain, wanted, shard), shape=shape)


def _own_scales(scales: Tensor, rows: Sequence[Range], shard: Shard) -> Tensor:
    width, (left, right) = shard.in_features, shard.columns
    if shard.kind == "columns":
        return scales.view(-1, width // BLOCK)[:, left // BLOCK : right // BLOCK].reshape(-1).clone()
    return torch.cat([scales[start * width // BLOCK : stop * width // BLOCK] for start, stop in rows])

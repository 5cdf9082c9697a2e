"""A process's part of weights that are held in int8 or int4: the values of the whole, bit for bit.

                  by rows (qkv, gate-up)             by columns (output, down)
int8              rows of codes, with their scales   columns of codes, the scales of whole rows
int4              rows of words, scales and zeros    whole groups; a group that a border would tear is held as
                                                     smaller ones of the same scale
int4, sorted      rows, and the order of all         the columns whose input is here, group by group, each group
(GPTQ's act-      columns                            filled up to a multiple of the smallest there is; what fills
order)                                               it reads a column of zeros behind the input
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.errors import ParallelError
from tunesmith.kernels.int4 import GROUPS, Int4Weight, pack_words, padded_width, unpack_words
from tunesmith.kernels.int8 import Int8Weight
from tunesmith.parallel.placement import Range, Shard

SMALLEST = min(GROUPS)


def cut_int8(weight: Int8Weight, shard: Shard, part: str) -> Int8Weight:
    """This process's part of one projection."""
    start, stop = shard.columns
    rows = shard.rows(part)
    return replace(weight, codes=_rows(weight.codes[:, start:stop], rows), scale=_rows(weight.scale, rows))


def cut_int4(weight: Int4Weight, shard: Shard, part: str) -> Int4Weight:
    """This process's part of one projection. Raises: ParallelError, see `share_group`."""
    if shard.kind == "rows":
        rows = shard.rows(part)
        zeros = None if weight.zeros is None else _rows(weight.zeros, rows)
        shape = (sum(stop - start for start, stop in rows), weight.shape[1])
        return replace(
            weight, words=_rows(weight.words, rows), scales=_rows(weight.scales, rows), zeros=zeros, shape=shape
        )
    if weight.order is not None:
        return _sorted_columns(weight, weight.order, shard.columns)
    return cut_columns(weight, shard.columns, share_group(weight.group_size, shard, part))


def share_group(group_size: int, shard: Shard, name: str) -> int:
    """Columns of a scale in a process's share of the columns: the whole's, or a part of it where a border tears it.

    Raises: ParallelError naming what would work, where a share is no multiple of the smallest group.
    """
    width = shard.own_in_features
    fitting = [group for group in GROUPS if group <= group_size and width % group == 0]
    if fitting:
        return max(fitting)
    whole = shard.in_features
    counts = [n for n in range(1, shard.count) if whole % n == 0 and (whole // n) % SMALLEST == 0]
    sizes = f"one of {', '.join(map(str, counts))}" if counts else "1"
    raise ParallelError(
        f"{name} is held in int4, and a share of its {whole} columns is {width}, not a multiple of {SMALLEST}, the "
        f"smallest group that shares a scale: set parallel.tensor to {sizes}, or quantize to int8 or fp8"
    )


def cut_columns(weight: Int4Weight, columns: Range, group: int) -> Int4Weight:
    """Neighbouring columns, in groups of `group`."""
    start, stop = columns
    repeats = weight.group_size // group

    def cut(of_groups: Tensor) -> Tensor:
        fine = of_groups.repeat_interleave(repeats, 1)[:, start // group : stop // group]
        return F.pad(fine, (0, padded_width(stop - start) // group - fine.shape[1])).contiguous()

    codes = unpack_words(weight.words, weight.shape[1])[:, start:stop]
    zeros = None if weight.zeros is None else cut(weight.zeros)
    shape = (weight.shape[0], stop - start)
    return replace(weight, words=pack_words(codes), scales=cut(weight.scales), zeros=zeros, shape=shape)


def _sorted_columns(weight: Int4Weight, order: Tensor, columns: Range) -> Int4Weight:
    """The held columns whose input is one of `columns`; the order is of these, and names what is behind them."""
    start, stop = columns
    mine = ((order >= start) & (order < stop)).nonzero()[:, 0]
    group_of = mine // weight.group_size
    counts = torch.bincount(group_of, minlength=-(-len(order) // weight.group_size))
    filled = -(-counts // SMALLEST) * SMALLEST
    first = filled.cumsum(0) - filled
    within = torch.arange(len(mine), device=mine.device) - (counts.cumsum(0) - counts)[group_of]
    places = first[group_of] + within
    width = int(filled.sum())
    codes = unpack_words(weight.words, weight.shape[1])
    held = codes.new_zeros(codes.shape[0], width)
    held[:, places] = codes[:, mine]
    inputs = order.new_full((width,), stop - start)
    inputs[places] = order[mine] - start

    def cut(of_groups: Tensor) -> Tensor:
        fine = of_groups[:, : len(filled)].repeat_interleave(filled // SMALLEST, 1)
        return F.pad(fine, (0, padded_width(width) // SMALLEST - fine.shape[1])).contiguous()

    return replace(
        weight,
        words=pack_words(held),
        scales=cut(weight.scales),
        zeros=None if weight.zeros is None else cut(weight.zeros),
        shape=(weight.shape[0], width),
        order=inputs,
    )


def _rows(tensor: Tensor, rows: Sequence[Range]) -> Tensor:
    """A tensor of its own, so that the whole can be let go."""
    return torch.cat([tensor[start:stop] for start, stop in rows])

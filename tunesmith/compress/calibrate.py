"""int4 weights chosen on a text: GPTQ spreads each rounding's error over the columns not yet rounded; AWQ scales the
columns that see large activations before rounding.

Both go block by block: the inputs of a block's linears are those that the quantised blocks before it make, and of each
linear only H = sum of x x.T over the tokens is kept, float32 [D, D]: the error of a weight W' is

    tr((W - W') H (W - W').T)

GPTQ, with the ranges of groups fixed beforehand, columns in the order of falling H[k, k], U the upper Cholesky factor
of the damped H's inverse:

    e = (w_k - round(w_k)) / U[k, k]        w_j -= e U[k, j] for all j after k

AWQ: s[k] = mean |x_k| ^ alpha, alpha by the least error; W s is rounded, and 1 / s goes into what makes x: the norm,
the value projection, or the up projection.
Sources: arXiv 2210.17323, algorithm 1; arXiv 2306.00978, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.kernels.int4 import CLIPS, Int4Weight, best_range, pack_words, padded_width, to_codes
from tunesmith.model.attention import PackedAttention
from tunesmith.model.block import Block, Mlp
from tunesmith.model.decoder import Decoder
from tunesmith.model.int4 import Int4Linear
from tunesmith.model.layers import Linear
from tunesmith.model.packed import PackedTokens, pack_documents
from tunesmith.model.weight_formats import WeightFormat, held_linear, hold_linears

DAMPING = 0.01
COLUMNS = 128
ALPHAS = tuple(i / 10 for i in range(11))
TOKENS_AT_ONCE = 4096


@dataclass
class Inputs:
    """What a linear saw: sum of x x.T, float32 [D, D]; sum of |x|, [D]; and of how many tokens."""

    products: Tensor
    sizes: Tensor
    num_tokens: int = 0

    def add(self, x: Tensor) -> None:
        """Take in more tokens."""
        wide = x.detach().flatten(0, -2).float()
        self.products.addmm_(wide.t(), wide)
        self.sizes += wide.abs().sum(0)
        self.num_tokens += wide.shape[0]


Rounder = Callable[[Tensor, Inputs, WeightFormat], Int4Weight]


@torch.no_grad()
def calibrate_gptq(decoder: Decoder, held: WeightFormat, documents: Sequence[Sequence[int]]) -> None:
    """Put int4 linears in place of those of the blocks, their codes chosen by GPTQ on `documents` (token ids)."""
    for block, inputs in _block_by_block(decoder, documents):
        for parent, name, linear in _linears(block):
            setattr(parent, name, _rounded(linear, inputs[linear], held, gptq))
    hold_linears(decoder, held)


@torch.no_grad()
def calibrate_awq(decoder: Decoder, held: WeightFormat, documents: Sequence[Sequence[int]]) -> None:
    """Put int4 linears in place of those of the blocks, columns scaled by AWQ on `documents` before rounding."""
    for block, inputs in _block_by_block(decoder, documents):
        _scale_block(block, inputs, held)
        for parent, name, linear in _linears(block):
            setattr(parent, name, _rounded(linear, inputs[linear], held, nearest))
    hold_linears(decoder, held)


@torch.no_grad()
def gptq(weight_FD: Tensor, inputs: Inputs, held: WeightFormat) -> Int4Weight:
    """The int4 form of a weight by GPTQ; by rounding where no token came by, or H can't be factored."""
    factor = _inverse_factor(inputs)
    if factor is None:
        return nearest(weight_FD, inputs, held)
    order, upper = factor
    scales_FG, zeros_FG = _ranges(weight_FD, inputs, held)
    group_D = order // held.group_size
    work = weight_FD.float()[:, order].contiguous()
    codes = torch.empty_like(work)
    width = work.shape[1]
    for start in range(0, width, COLUMNS):
        stop = min(start + COLUMNS, width)
        errors = torch.empty(work.shape[0], stop - start, device=work.device)
        for k in range(start, stop):
            scale, zero = scales_FG[:, group_D[k]], zeros_FG[:, group_D[k]]
            codes[:, k] = to_codes(work[:, k], scale, zero)
            error = (work[:, k] - (codes[:, k] - zero) * scale) / upper[k, k]
            work[:, k:stop].addr_(error, upper[k, k:stop], alpha=-1)
            errors[:, k - start] = error
        work[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    in_order = torch.empty_like(codes)
    in_order[:, order] = codes
    return _packed(in_order, scales_FG, zeros_FG, held, weight_FD.dtype)


@torch.no_grad()
def nearest(weight_FD: Tensor, inputs: Inputs, held: WeightFormat) -> Int4Weight:
    """The int4 form of a weight by rounding, ranges of groups by the least error weighted by each column's H[k, k]."""
    scales_FG, zeros_FG = _ranges(weight_FD, inputs, held)
    groups = _groups(weight_FD, held)
    codes = to_codes(groups, scales_FG[..., None], zeros_FG[..., None]).flatten(1)[:, : weight_FD.shape[1]]
    return _packed(codes, scales_FG, zeros_FG, held, weight_FD.dtype)


def output_error(weight_FD: Tensor, other_FD: Tensor, inputs: Inputs) -> float:
    """Sum over the tokens of |W x - W' x|^2."""
    difference = weight_FD.float() - other_FD.float()
    return float(((difference @ inputs.products) * difference).sum())


def _block_by_block(
    decoder: Decoder, documents: Sequence[Sequence[int]]
) -> Iterator[tuple[Block, dict[nn.Module, Inputs]]]:
    """Every block with what its linears see; the block is run again, as the caller left it, for the next one."""
    packs = list(_packs(documents, decoder.embedding.weight.device))
    hidden = [decoder.embed(pack.tokens_T, pack.positions_T) for pack in packs]
    for layer, block in enumerate(decoder.blocks):
        assert isinstance(block, Block)
        with _Watch(block) as inputs:
            for pack, stream in zip(packs, hidden, strict=True):
                _run(decoder, block, layer, pack, stream)
        yield block, inputs
        hidden = [_run(decoder, block, layer, pack, s) for pack, s in zip(packs, hidden, strict=True)]


def _run(decoder: Decoder, block: Block, layer: int, pack: PackedTokens, stream: Tensor) -> Tensor:
    return block(stream, decoder.rope(pack.positions_T, stream.dtype), PackedAttention(decoder.config, pack)[layer])


def _packs(documents: Sequence[Sequence[int]], device: torch.device) -> Iterator[PackedTokens]:
    waiting: list[Sequence[int]] = []
    for document in documents:
        waiting.append(document)
        if sum(map(len, waiting)) >= TOKENS_AT_ONCE:
            yield pack_documents(waiting, device)
            waiting = []
    if waiting:
        yield pack_documents(waiting, device)


class _Watch:
    """While open, what goes into the linears of a block is taken in."""

    def __init__(self, block: Block) -> None:
        self.inputs: dict[nn.Module, Inputs] = {}
        self.handles: list[Any] = []
        for _, _, linear in _linears(block):
            width, device = linear.in_features, linear.weight.device
            self.inputs[linear] = Inputs(torch.zeros(width, width, device=device), torch.zeros(width, device=device))

    def __enter__(self) -> dict[nn.Module, Inputs]:
        for linear in self.inputs:
            self.handles.append(linear.register_forward_pre_hook(self._take))
        return self.inputs

    def _take(self, linear: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.inputs[linear].add(arguments[0])

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _linears(block: nn.Module) -> list[tuple[nn.Module, str, Linear]]:
    return [
        (parent, name, child)
        for parent in block.modules()
        for name, child in parent.named_children()
        if type(child) is Linear and name != "router"
    ]


def _rounded(linear: Linear, inputs: Inputs, held: WeightFormat, rounder: Rounder) -> Int4Linear:
    out = cast(Int4Linear, held_linear(linear, held))
    for part in linear.parts:
        bias = None if linear.bias is None else linear.bias[linear.rows(part)]
        out.load_part(part, rounder(linear.part_weight(part), inputs, held), bias)
    return out


def _inverse_factor(inputs: Inputs) -> tuple[Tensor, Tensor] | None:
    """The order of columns, and the upper Cholesky factor of the damped H's inverse in that order."""
    diagonal = inputs.products.diagonal()
    if inputs.num_tokens == 0 or not bool(torch.isfinite(inputs.products).all()):
        return None
    order = torch.argsort(diagonal, descending=True, stable=True)
    damped = inputs.products[order][:, order].clone()
    damped.diagonal().add_(DAMPING * diagonal.mean() + 1e-8)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(failed) else (order, upper)


def _groups(weight_FD: Tensor, held: WeightFormat) -> Tensor:
    """float32 [F, groups, G], padded with zeros to whole blocks."""
    rows, width = weight_FD.shape
    return F.pad(weight_FD.float(), (0, padded_width(width) - width)).view(rows, -1, held.group_size)


def _ranges(weight_FD: Tensor, inputs: Inputs, held: WeightFormat) -> tuple[Tensor, Tensor]:
    """Scales and zero points [F, groups]."""
    width = weight_FD.shape[1]
    importance = F.pad(inputs.products.diagonal() + 1e-12, (0, padded_width(width) - width))
    groups = _groups(weight_FD, held)
    scales, zeros = best_range(groups, held.symmetric, CLIPS, importance.view(1, -1, held.group_size))
    return scales[..., 0], zeros[..., 0]


def _packed(
    codes_FD: Tensor, scales_FG: Tensor, zeros_FG: Tensor, held: WeightFormat, dtype: torch.dtype
) -> Int4Weight:
    rows, width = codes_FD.shape
    zeros = None if held.symmetric else zeros_FG.to(torch.uint8)
    return Int4Weight(pack_words(codes_FD.to(torch.uint8)), scales_FG.to(torch.bfloat16), zeros, (rows, width), dtype)


def _scale_block(block: Block, inputs: dict[nn.Module, Inputs], held: WeightFormat) -> None:
    """Fold AWQ's scales into a block: the linears' columns grow, what makes their input shrinks."""
    attention = block.attention
    qkv, output = attention.qkv, attention.output
    _scale(qkv, inputs[qkv], held, _norm_shrinker(block.attention_norm))
    if "v_proj" in qkv.parts:
        shape = (attention.num_kv_heads, attention.num_heads // attention.num_kv_heads, attention.head_dim)
        _scale(output, inputs[output], held, _row_shrinker(qkv, "v_proj", shape), shape)
    if not isinstance(block.mlp, Mlp):
        return  # a router and many experts share the norm
    up, down = block.mlp.up, block.mlp.down
    _scale(up, inputs[up], held, _norm_shrinker(block.mlp_norm))
    if block.mlp.gated:
        _scale(down, inputs[down], held, _row_shrinker(up, "up_proj", None))


def _norm_shrinker(norm: nn.Module) -> Callable[[Tensor], None]:
    def shrink(scale_D: Tensor) -> None:
        for parameter in norm.parameters():
            parameter.copy_(parameter.float() / scale_D)

    return shrink


def _row_shrinker(linear: Linear, part: str, shape: tuple[int, int, int] | None) -> Callable[[Tensor], None]:
    """Of a projection's rows. shape: key heads, query heads of each, head size, where a row feeds several columns."""

    def shrink(scale_D: Tensor) -> None:
        scale_F = scale_D if shape is None else scale_D.view(shape)[:, 0].flatten()
        rows = linear.rows(part)
        linear.weight[rows] = (linear.weight[rows].float() / scale_F[:, None]).to(linear.weight.dtype)
        if linear.bias is not None:
            linear.bias[rows] = (linear.bias[rows].float() / scale_F).to(linear.bias.dtype)

    return shrink


def _scale(
    linear: Linear,
    inputs: Inputs,
    held: WeightFormat,
    shrink: Callable[[Tensor], None],
    shared: tuple[int, int, int] | None = None,
) -> None:
    """Scale a linear's columns by the best of the exponents, and what makes its input by the inverse."""
    if inputs.num_tokens == 0:
        return
    size_D = (inputs.sizes / inputs.num_tokens).clamp(min=1e-4)
    if shared is not None:
        size_D = size_D.view(shared).mean(1, keepdim=True).expand(shared).flatten()
    weight = linear.weight.detach().float()
    best, least = torch.ones_like(size_D), float("inf")
    for alpha in ALPHAS:
        scale_D = size_D**alpha
        scale_D = scale_D / (scale_D.max() * scale_D.min()).sqrt()
        groups = _groups(weight * scale_D, held)
        scales, zeros = best_range(groups, held.symmetric, (1.0,))
        rounded = (to_codes(groups, scales, zeros) - zeros) * scales
        error = output_error(weight, rounded.flatten(1)[:, : weight.shape[1]] / scale_D, inputs)
        if error < least:
            best, least = scale_D, error
    linear.weight.copy_(weight * best)
    inputs.products /= best[:, None] * best[None, :]
    inputs.sizes /= best
    shrink(best)

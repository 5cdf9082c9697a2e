"""Linears around the norms of a step of few tokens: which of them leave no launch to the norm, and their products.

The linear before a norm adds to the stream and prepares it, the one behind it ends it: kernels/stream_products.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from tunesmith.kernels import stream_products
from tunesmith.kernels.direct import direct
from tunesmith.kernels.nf4 import use_kernel
from tunesmith.kernels.stream_products import Unscaled, wants_raised
from tunesmith.model.block import Block, Mlp
from tunesmith.model.decode_linears import held_for_few, swiglu_product
from tunesmith.model.layers import RMSNorm
from tunesmith.model.stream import WHOLE

# 16 bits, int8, fp8.
_FORMATS = (0, 1, 2)
_DTYPE = torch.bfloat16


class Joined(NamedTuple):
    """Of a block's two sums, whether the norm behind each is left to the linears around it."""

    after_attention: bool = False
    after_mlp: bool = False


def joined_norms(blocks: Sequence[Block], stream_TD: Tensor) -> list[Joined]:
    """What a pass over these tokens joins, block by block. The norm behind the last block is nobody's.

    Only in bfloat16: stream * weight may leave float16's range. Where processes share a model their parts of a sum
    come from elsewhere; linears with adapters, of other formats or for other numbers of tokens are not taken.
    """
    if not (
        0 < len(stream_TD) <= stream_products.MOST_TOKENS
        and stream_TD.dtype == _DTYPE
        and torch.is_inference_mode_enabled()
        and use_kernel(stream_TD.device)
        and all(block.stream is WHOLE for block in blocks)
    ):
        return [Joined()] * len(blocks)
    inputs = cache(lambda width: stream_TD.new_empty(len(stream_TD), width))

    def takes(linear: nn.Module | None) -> bool:
        return linear is not None and _few(linear, inputs(cast(Any, linear).in_features)) is not None

    readers = [block.attention.qkv for block in blocks]
    return [
        Joined(
            after_attention=_is_swiglu(block.mlp) and takes(block.attention.output) and takes(cast(Mlp, block.mlp).up),
            after_mlp=_is_swiglu(block.mlp) and takes(cast(Mlp, block.mlp).down) and takes(reader),
        )
        for block, reader in zip(blocks, [*readers[1:], None], strict=True)
    ]


def added_product(
    linear: nn.Module, x_TD: Tensor, stream_TD: Tensor, norm: RMSNorm, reader: nn.Module
) -> tuple[Tensor, Unscaled]:
    """The stream with this linear's product added, and its norm for the linear that reads it, where they are joined."""
    from tunesmith.kernels.gemv_operators import added_few_operator

    held, reads = _few(linear, x_TD), _few(reader, stream_TD)
    assert held is not None
    assert reads is not None
    is_raised, bias = wants_raised(reads[0]), cast(Any, linear).bias
    call = direct(added_few_operator, x_TD)
    new_TD, next_TD, squares_TP = call(held[0], x_TD, *held[1:3], bias, stream_TD, norm.weight, is_raised)
    return new_TD, Unscaled(next_TD, squares_TP, norm.eps, is_raised)


def normed_product(linear: nn.Module, y_TD: Tensor | Unscaled) -> Tensor:
    """What the linear gives for a norm's output, whoever ends that norm."""
    return _ended(linear, y_TD, False) if isinstance(y_TD, Unscaled) else cast(Tensor, linear(y_TD))


def normed_swiglu(linear: nn.Module, y_TD: Tensor | Unscaled) -> Tensor | None:
    """`swiglu_product` of a norm's output, whoever ends that norm."""
    return _ended(linear, y_TD, True) if isinstance(y_TD, Unscaled) else swiglu_product(linear, y_TD)


def _ended(linear: nn.Module, given: Unscaled, is_gated: bool) -> Tensor:
    from tunesmith.kernels.gemv_operators import normed_few_operator

    held = _few(linear, given.x_TD)
    assert held is not None
    norm, bias = (given.squares_TP, given.eps, given.is_raised), cast(Any, linear).bias
    y_TF: Tensor = direct(normed_few_operator, given.x_TD)(held[0], given.x_TD, *norm, *held[1:3], bias, is_gated)
    return y_TF


def _few(linear: nn.Module, x_TD: Tensor) -> tuple[int, Tensor, Tensor | None, Tensor | None] | None:
    """Format, weight and scales of a linear that such a launch takes."""
    from tunesmith.kernels.gemv_quads_triton import takes_quads

    held = held_for_few(linear, x_TD)
    return held if held is not None and held[0] in _FORMATS and takes_quads(held[0], x_TD) else None


def _is_swiglu(mlp: nn.Module) -> bool:
    return isinstance(mlp, Mlp) and mlp.is_swiglu

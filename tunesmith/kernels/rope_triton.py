"""Rope's Triton kernel, as a torch custom operator. Imported only where Triton is installed."""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current
from tunesmith.units import ceil_div

# Pairs of one program at most: two loads of 16 bytes a thread for either half of a pair.
_PAIRS = 2048


@torch.library.custom_op("tunesmith::rope_", mutates_args=("x",))
def rope_operator(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """Rotate every head of x [T, N, H] in place."""
    num_tokens, num_heads, head_dim = x.shape
    half = head_dim // 2
    columns = 1 << max(half - 1, 0).bit_length()
    heads = heads_of_a_program(num_heads, columns)
    blocks = ceil_div(num_heads, heads)
    if not x.numel():
        return
    with current(x.device):
        _rope_kernel[(num_tokens * blocks,)](
            x,
            cos.contiguous(),
            sin.contiguous(),
            *x.stride(),
            NUM_HEADS=num_heads,
            HALF=half,
            HEADS=heads,
            COLUMNS=columns,
            INVERSE=inverse,
            num_warps=max(1, min(4, heads * columns // 512)),
            enable_fp_fusion=False,  # rounds as plain torch does
        )


@rope_operator.register_fake
def _rope_fake(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    return None


def heads_of_a_program(num_heads: int, columns: int) -> int:
    """Heads that one program rotates: the most (a power of two) that leaves at most a quarter of its places idle."""
    heads = max(1, _PAIRS // columns)
    while heads > 1 and 4 * num_heads < 3 * heads * ceil_div(num_heads, heads):
        heads //= 2
    return heads


@jit
def _rope_kernel(
    x,
    cos,
    sin,
    token_stride,
    head_stride,
    last_stride,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INVERSE: tl.constexpr,
) -> None:
    blocks: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    token = (tl.program_id(0) // blocks).to(tl.int64)
    head = (tl.program_id(0) % blocks) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, COLUMNS)
    in_half = column < HALF
    mask = (head < NUM_HEADS)[:, None] & in_half[None, :]
    cosine = tl.load(cos + token * HALF + column, mask=in_half, other=0.0)[None, :]
    sine = tl.load(sin + token * HALF + column, mask=in_half, other=0.0)[None, :]
    if INVERSE:
        sine = -sine
    first_at = x + token * token_stride + head.to(tl.int64)[:, None] * head_stride + column[None, :] * last_stride
    second_at = first_at + HALF * last_stride
    first = tl.load(first_at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(second_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(first_at, (first * cosine - second * sine).to(x.dtype.element_ty), mask=mask)
    tl.store(second_at, (second * cosine + first * sine).to(x.dtype.element_ty), mask=mask)

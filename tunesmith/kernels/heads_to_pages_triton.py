"""The kernel of kernels/heads_to_pages.py, as a torch custom operator. Imported only where Triton is installed."""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.gemv_fragments_triton import when_earlier_is_through
from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current, overlaps
from tunesmith.kernels.overlap_triton import let_next_begin
from tunesmith.kernels.quick import quick
from tunesmith.units import ceil_div

# Tokens of one program by how many there are: one program a token and head where there are few, to fill the chip; no
# more programs than run at once where there are many (256 tokens of 36 heads one by one: 6.7 us on an H200, for 1 of
# bytes).
_TOKENS_FROM = ((512, 8), (128, 4), (0, 1))


@torch.library.custom_op("tunesmith::heads_to_pages", mutates_args=("keys", "values"))
def heads_to_pages_operator(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    invariant: bool,
    keeps_keys: bool,
) -> Tensor:
    """query [T, N, H], or with `keeps_keys` [T, N + K, H]; keys and values are written into their slots of the pages.

    invariant: always one token a program. Several lie in threads otherwise, and the sum of a head's norm is another.
    """
    num_tokens, head_dim = qkv.shape[0], keys.shape[-1]
    given_heads = num_heads + num_kv_heads * keeps_keys
    query = qkv.new_empty(num_tokens, given_heads, head_dim)
    if not num_tokens:
        return query
    tokens = 1 if invariant else tokens_of_a_program(num_tokens)
    columns = 1 << max((head_dim + 1) // 2 - 1, 0).bit_length()
    overlap = {"launch_pdl": True} if overlaps(qkv.device) and not invariant else {}
    with current(qkv.device):
        quick(_heads_to_pages_kernel)[(ceil_div(num_tokens, tokens), num_heads + 2 * num_kv_heads)](
            qkv,
            query_weight,
            key_weight,
            cos,
            sin,
            query,
            keys,
            values,
            slots,
            num_tokens,
            eps,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            GIVEN_HEADS=given_heads,
            HALF=head_dim // 2,
            TOKENS=tokens,
            COLUMNS=columns,
            HAS_NORM=query_weight is not None,
            HAS_ROPE=cos is not None,
            OVERLAP=bool(overlap),
            num_warps=max(1, min(4, tokens * columns // 128)),
            enable_fp_fusion=False,  # rounds as plain torch does
            **overlap,
        )
    return query


@heads_to_pages_operator.register_fake
def _heads_to_pages_fake(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    invariant: bool,
    keeps_keys: bool,
) -> Tensor:
    return qkv.new_empty(qkv.shape[0], num_heads + num_kv_heads * keeps_keys, keys.shape[-1])


def tokens_of_a_program(num_tokens: int) -> int:
    """Tokens that one program takes of a head."""
    return next(tokens for least, tokens in _TOKENS_FROM if num_tokens >= least)


@jit
def _weights(weight, column, mask, HALF: tl.constexpr, dtype: tl.constexpr):
    # Of a norm, for both halves of a head.
    low = tl.load(weight + column, mask=mask, other=0.0).to(dtype).to(tl.float32)[None, :]
    high = tl.load(weight + HALF + column, mask=mask, other=0.0).to(dtype).to(tl.float32)[None, :]
    return low, high


@jit
def _angles(cos, sin, token, column, mask, HALF: tl.constexpr):
    cosine = tl.load(cos + token[:, None] * HALF + column[None, :], mask=mask, other=0.0)
    sine = tl.load(sin + token[:, None] * HALF + column[None, :], mask=mask, other=0.0)
    return cosine, sine


@jit(do_not_specialize=["num_tokens"])
def _heads_to_pages_kernel(
    qkv,
    query_weight,
    key_weight,
    cos,
    sin,
    query,
    keys,
    values,
    slots,
    num_tokens,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GIVEN_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_ROPE: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    # OVERLAP: slots, tables and norms' weights are there since before the pass's last ordinary launch (`overlapped`).
    WIDTH: tl.constexpr = 2 * HALF
    ALL_HEADS: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    head = tl.program_id(1)
    if OVERLAP:
        head = let_next_begin(head)
    is_query = head < NUM_HEADS
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    in_tokens = token < num_tokens
    column = tl.arange(0, COLUMNS)
    in_half = column < HALF
    mask = in_tokens[:, None] & in_half[None, :]
    dtype = query.dtype.element_ty
    if OVERLAP:
        slot = tl.load(slots + token, mask=in_tokens & (head >= NUM_HEADS), other=-1)
        if HAS_NORM:
            early = query_weight if is_query else key_weight
            low, high = _weights(early, column, in_half & (not is_value), HALF, dtype)
        if HAS_ROPE:
            cosine, sine = _angles(cos, sin, token, column, mask & (not is_value), HALF)
        head = when_earlier_is_through(head)
    source = qkv + (token * ALL_HEADS + head)[:, None] * WIDTH + column[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        weight = query_weight if is_query else key_weight
        if not is_value:
            squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
            scale = tl.math.rsqrt(squares / WIDTH + eps)[:, None]
            if not OVERLAP:
                low, high = _weights(weight, column, in_half, HALF, dtype)
            first = ((first * scale).to(dtype).to(tl.float32) * low).to(dtype).to(tl.float32)
            second = ((second * scale).to(dtype).to(tl.float32) * high).to(dtype).to(tl.float32)
    if HAS_ROPE:  # noqa: SIM102 (the first is known when compiling)
        if not is_value:
            if not OVERLAP:
                cosine, sine = _angles(cos, sin, token, column, mask, HALF)
            rotated = first * cosine - second * sine
            second = second * cosine + first * sine
            first = rotated
    if head < GIVEN_HEADS:
        target = query + (token * GIVEN_HEADS + head)[:, None] * WIDTH + column[None, :]
        tl.store(target, first.to(dtype), mask=mask)
        tl.store(target + HALF, second.to(dtype), mask=mask)
    if not is_query:
        if not OVERLAP:
            slot = tl.load(slots + token, mask=in_tokens, other=-1)
        written = mask & (slot >= 0)[:, None]
        pages = values if is_value else keys
        kv_head = head - NUM_HEADS - (NUM_KV_HEADS if is_value else 0)
        target = pages + (slot * NUM_KV_HEADS + kv_head)[:, None] * WIDTH + column[None, :]
        tl.store(target, first.to(dtype), mask=written)
        tl.store(target + HALF, second.to(dtype), mask=written)

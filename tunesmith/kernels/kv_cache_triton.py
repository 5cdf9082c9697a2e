"""The Triton kernels that write keys and values into pages, as a torch custom operator.

Imported only where Triton is installed.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.jit import jit
from tunesmith.kernels.kv_cache_scale import EXPONENT, EXPONENT_OF_448, MANTISSA_ABOVE_448, SMALLEST_SCALE
from tunesmith.kernels.launch import current, tile
from tunesmith.kernels.quick import quick
from tunesmith.units import ceil_div


@torch.library.custom_op("tunesmith::write_kv", mutates_args=("keys", "values", "key_scales", "value_scales"))
def write_kv_operator(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> None:
    """See tunesmith.kernels.kv_cache.write_kv. (No defaults: torch 2.11 counts versions of arguments that it left out.)

    What has to move, with b bytes a value: 4 b T K H, read and written once; 2 T K H (b + 1) into fp8.
    """
    key, value = _heads_in_order(key), _heads_in_order(value)
    num_tokens, num_heads, head_dim = key.shape
    if num_tokens == 0:
        return
    with current(keys.device):
        if key_scales is None or value_scales is None:
            rows, columns, warps = tile(num_heads * head_dim)
            quick(_write_kernel)[(ceil_div(num_tokens, rows),)](
                key,
                value,
                keys,
                values,
                slots,
                num_tokens,
                key.stride(0),
                value.stride(0),
                WIDTH=num_heads * head_dim,
                ROWS=rows,
                COLUMNS=columns,
                num_warps=warps,
                enable_fp_fusion=True,
            )
            return
        quick(_write_fp8_kernel)[(num_tokens, num_heads)](
            key,
            value,
            keys,
            values,
            key_scales,
            value_scales,
            slots,
            num_tokens,
            key.stride(0),
            value.stride(0),
            NUM_HEADS=num_heads,
            SLOTS=keys.shape[1],
            WIDTH=head_dim,
            COLUMNS=triton.next_power_of_2(head_dim),
            MANTISSA_ABOVE_448=MANTISSA_ABOVE_448,
            EXPONENT=EXPONENT,
            EXPONENT_OF_448=EXPONENT_OF_448,
            SMALLEST=SMALLEST_SCALE,
            num_warps=1,
            enable_fp_fusion=False,  # nothing is multiplied and added
        )


@write_kv_operator.register_fake
def _write_kv_fake(
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> None:
    return None


def _heads_in_order(new_TKH: Tensor) -> Tensor:
    """A token's heads as one row of memory; tokens may have any stride."""
    is_row = new_TKH.stride(2) == 1 and new_TKH.stride(1) == new_TKH.shape[2]
    return new_TKH if is_row else new_TKH.contiguous()


@jit(do_not_specialize=["num_tokens"])
def _write_kernel(
    key,
    value,
    keys,
    values,
    slots,
    num_tokens,
    key_stride,
    value_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    slot = tl.load(slots + token, mask=token < num_tokens, other=-1)
    mask = (slot >= 0)[:, None] & (column < WIDTH)
    token = token.to(tl.int64)[:, None]
    new_key = tl.load(key + token * key_stride + column, mask=mask)
    new_value = tl.load(value + token * value_stride + column, mask=mask)
    place = slot.to(tl.int64)[:, None] * WIDTH + column
    tl.store(keys + place, new_key.to(keys.dtype.element_ty), mask=mask)
    tl.store(values + place, new_value.to(values.dtype.element_ty), mask=mask)


@jit
def _write_head(
    new,
    pages,
    scales,
    page,
    head,
    offset,
    token,
    where,
    mine,
    stride,
    NUM_HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    MANTISSA_ABOVE_448: tl.constexpr,
    EXPONENT: tl.constexpr,
    EXPONENT_OF_448: tl.constexpr,
    SMALLEST: tl.constexpr,
) -> None:
    row = tl.arange(0, SLOTS)
    column = tl.arange(0, COLUMNS)[None, :]
    in_width = column < WIDTH
    source = new + (token + row).to(tl.int64)[:, None] * stride + head * WIDTH + column
    value = tl.load(source, mask=mine[:, None] & in_width, other=0.0).to(tl.float32)
    largest = tl.max(tl.max(tl.abs(value), axis=1), axis=0)
    exponent = (largest.to(tl.int32, bitcast=True) + MANTISSA_ABOVE_448) & EXPONENT
    scale = tl.maximum(exponent - EXPONENT_OF_448, 0).to(tl.float32, bitcast=True)
    scale = tl.maximum(scale, SMALLEST)
    place = scales + page * NUM_HEADS + head
    old = SMALLEST
    if offset > 0:
        old = tl.load(place)
    scale = tl.maximum(scale, old)
    codes = pages + (page * SLOTS * NUM_HEADS + head) * WIDTH + column
    if (offset > 0) & (scale > old):
        before = codes + row[:, None] * (NUM_HEADS * WIDTH)
        mask = (row < offset)[:, None] & in_width
        held = tl.load(before, mask=mask, other=0.0).to(tl.float32)
        tl.store(before, (held * tl.div_rn(old, scale)).to(tl.float8e4nv), mask=mask)
    tl.store(place, scale)
    code = (value * tl.div_rn(1.0, scale)).to(tl.float8e4nv)
    tl.store(codes + where[:, None] * (NUM_HEADS * WIDTH), code, mask=mine[:, None] & in_width)


@jit(do_not_specialize=["num_tokens"])
def _write_fp8_kernel(
    key,
    value,
    keys,
    values,
    key_scales,
    value_scales,
    slots,
    num_tokens,
    key_stride,
    value_stride,
    NUM_HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    MANTISSA_ABOVE_448: tl.constexpr,
    EXPONENT: tl.constexpr,
    EXPONENT_OF_448: tl.constexpr,
    SMALLEST: tl.constexpr,
) -> None:
    # The first of a page's tokens in the batch does the work of all of them: nobody else writes this page.
    token, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + token)
    before = tl.load(slots + token - 1, mask=token > 0, other=-1)
    page = slot // SLOTS
    is_first = (slot >= 0) & ((before < 0) | (before // SLOTS != page))
    if is_first:
        offset = slot % SLOTS
        ahead = token + tl.arange(0, SLOTS)
        following = tl.load(slots + ahead, mask=ahead < num_tokens, other=-1)
        mine = (following >= 0) & (following // SLOTS == page)
        where = following % SLOTS
        _write_head(
            key,
            keys,
            key_scales,
            page,
            head,
            offset,
            token,
            where,
            mine,
            key_stride,
            NUM_HEADS,
            SLOTS,
            WIDTH,
            COLUMNS,
            MANTISSA_ABOVE_448,
            EXPONENT,
            EXPONENT_OF_448,
            SMALLEST,
        )
        _write_head(
            value,
            values,
            value_scales,
            page,
            head,
            offset,
            token,
            where,
            mine,
            value_stride,
            NUM_HEADS,
            SLOTS,
            WIDTH,
            COLUMNS,
            MANTISSA_ABOVE_448,
            EXPONENT,
            EXPONENT_OF_448,
            SMALLEST,
        )

"""Triton kernels of products of one token with a weight in any format, as torch custom operators.

One program holds ROWS output rows and walks the whole width, so that sums are made in one order whatever the grid, and
there is nothing to add up between programs: at real sizes there are more programs than the chip holds at once, and
splitting the width over programs as well would only cost a second pass. Inside, the warps of a program lie along the
width (each lane reads 16 bytes of every row), and every lane keeps all rows, so that the input is read and widened once
for ROWS rows.

Codes become float32 without conversion instructions: their bits are put into the mantissa of a number between 1 and 2
(v = 1 + code / 16, or / 256), and what that adds, the sum of the input, is taken off once for all rows. fp8's sign,
exponent and mantissa are moved into a float32 whose exponent is 120 too small; the input is scaled by 2^60 on the one
side, the sum on the other. Imported only where Triton is installed.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current
from tunesmith.kernels.quick import quick
from tunesmith.units import ceil_div

# By format: output rows and warps of one program.
SHAPES = {0: (8, 4), 1: (8, 4), 2: (8, 4), 3: (8, 4), 4: (4, 4)}
FLOAT, INT8, FP8, INT4, NF4 = (tl.constexpr(i) for i in range(5))


@jit
def _float_tile(x, w, row, n, WIDTH: tl.constexpr):
    # 8 columns a lane of 16-bit weights: [R, N, 8]
    column = n[:, None] * 8 + tl.arange(0, 8)[None, :]
    value = tl.load(x + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    at = row[:, None, None] * WIDTH + tl.minimum(column, WIDTH - 8 + column % 8)[None, :, :]
    weight = tl.load(w + at, eviction_policy="evict_first")
    return tl.sum(weight.to(tl.float32) * value[None, :, :], axis=2)


@jit
def _words(w, row, n, NUM_WORDS: tl.constexpr):
    # 4 words a lane: [R, N, 4]
    word = n[:, None] * 4 + tl.arange(0, 4)[None, :]
    at = row[:, None, None] * NUM_WORDS + tl.minimum(word, NUM_WORDS - 4 + word % 4)[None, :, :]
    return tl.load(w + at, eviction_policy="evict_first"), word


@jit
def _byte_tile(x, w, row, n, WIDTH: tl.constexpr, FP8: tl.constexpr):
    # 16 columns a lane: [R, N, 16]
    column = n[:, None] * 16 + tl.arange(0, 16)[None, :]
    value = tl.load(x + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    at = row[:, None, None] * WIDTH + tl.minimum(column, WIDTH - 16 + column % 16)[None, :, :]
    codes = tl.load(w + at, eviction_policy="evict_first")
    if FP8:
        # Sign, exponent and mantissa where float32 has them, the exponent 120 too small; 0x87F00000 keeps the sign,
        # which the shift copies down, and the other seven bits.
        bits = (codes.to(tl.int32) << 20) & -2014314496
        weight = bits.to(tl.float32, bitcast=True)
        value *= 1152921504606846976.0  # 2^60
    else:
        weight = codes.to(tl.float32)
    return tl.sum(weight * value[None, :, :], axis=2)


@jit
def _int4_tile(x, w, scales, zeros, row, n, WIDTH: tl.constexpr, PER_BLOCK: tl.constexpr, ZEROS: tl.constexpr):
    NUM_BLOCKS: tl.constexpr = (WIDTH + 127) // 128
    words, word = _words(w, row, n, NUM_BLOCKS * 16)
    first = (word // 16) * 128 + word % 16
    block = tl.minimum(n // 4, NUM_BLOCKS - 1)
    group = row[:, None] * (NUM_BLOCKS * PER_BLOCK) + (block * PER_BLOCK)[None, :]
    out = tl.zeros([words.shape[0], words.shape[1]], tl.float32)
    for part in tl.static_range(PER_BLOCK):
        total = tl.zeros(words.shape, tl.float32)
        shifted = tl.zeros(word.shape, tl.float32)
        inputs = tl.zeros(word.shape, tl.float32)
        for pair in tl.static_range(part * 4 // PER_BLOCK, (part + 1) * 4 // PER_BLOCK):
            # Two nibbles in bits 15 to 22, the mantissa's highest.
            moved = words << (15 - 8 * pair) if pair < 2 else words >> (8 * pair - 15)
            column = first + 32 * pair
            low = tl.load(x + column, mask=column < WIDTH, other=0.0).to(tl.float32)
            high = tl.load(x + column + 16, mask=column + 16 < WIDTH, other=0.0).to(tl.float32)
            raised = low * 16
            total += ((moved & 0x078000) | 0x3F800000).to(tl.float32, bitcast=True) * raised[None, :, :]
            total += ((moved & 0x780000) | 0x3F800000).to(tl.float32, bitcast=True) * high[None, :, :]
            shifted += raised + high
            inputs += low + high
        scale = tl.load(scales + group + part).to(tl.float32)
        products = (tl.sum(total, axis=2) - tl.sum(shifted, axis=1)[None, :]) * 16.0
        zero = 8.0
        if ZEROS:
            zero = tl.load(zeros + group + part).to(tl.float32)
        out += scale * (products - zero * tl.sum(inputs, axis=1)[None, :])
    return out


@jit
def _nf4_tile(x, w, scales, inner, offset, table, dynamic, row, n, WIDTH: tl.constexpr, DOUBLE: tl.constexpr):
    words, word = _words(w, row, n, WIDTH // 8)
    block = row[:, None] * (WIDTH // 64) + tl.minimum(n // 2, WIDTH // 64 - 1)[None, :]
    scale = tl.load(scales + block)
    if DOUBLE:
        scale = tl.load(dynamic + scale.to(tl.int32)) * tl.load(inner + block // 256) + tl.load(offset)
    total = tl.zeros(words.shape, tl.float32)
    for c in tl.static_range(8):
        # Column c of a word: bytes in order, the high half of each first.
        column = word * 8 + c
        value = tl.load(x + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        code = (words >> (c // 2 * 8 + (1 - c % 2) * 4)) & 15
        total += tl.load(table + code) * value[None, :, :]
    return tl.sum(total, axis=2) * scale


@jit
def gemv_kernel(
    x,
    w,
    scales,
    zeros,
    inner,
    offset,
    table,
    dynamic,
    bias,
    out,
    num_rows,
    WIDTH: tl.constexpr,
    FORMAT: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """out[f] = sum of x[k] w[f, k] (+ bias[f]). ZEROS: int4 has zero points, NF4 doubly quantised scales.

    What lies outside is read from inside and multiplied by 0, or not stored: loads without masks need no registers set
    to zero before.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    held = tl.minimum(row, num_rows - 1).to(tl.int64)
    acc = tl.zeros([ROWS, LANES], tl.float32)
    per_lane: tl.constexpr = 8 if FORMAT == FLOAT else (32 if FORMAT >= INT4 else 16)
    for start in range(0, WIDTH, LANES * per_lane):
        n = start // per_lane + tl.arange(0, LANES)
        if FORMAT == FLOAT:
            acc += _float_tile(x, w, held, n, WIDTH)
        elif FORMAT == INT4:
            acc += _int4_tile(x, w, scales, zeros, held, n, WIDTH, PER_BLOCK, ZEROS)
        elif FORMAT == NF4:
            acc += _nf4_tile(x, w, scales, inner, offset, table, dynamic, held, n, WIDTH, ZEROS)
        else:
            acc += _byte_tile(x, w, held, n, WIDTH, FORMAT == FP8)
    y = tl.sum(acc, axis=1)
    if FORMAT == INT8:
        y *= tl.load(scales + held)
    if FORMAT == FP8:
        y *= 1152921504606846976.0 * tl.load(scales + held)
    if BIAS:
        y += tl.load(bias + held).to(tl.float32)
    tl.store(out + row, y.to(out.dtype.element_ty), mask=inside)


def gemv(
    format_id: int,
    x_D: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bias_F: Tensor | None,
    out_F: Tensor,
    *,
    per_block: int = 1,
    has_zeros: bool = False,
    nf4: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    shape: tuple[int, int] | None = None,
) -> None:
    """Launch the kernel: one token's product into `out_F`. nf4: inner scales, their offset, and both tables.

    shape: rows and warps of a program (None: those of `SHAPES`).
    """
    rows, warps = shape or SHAPES[format_id]
    num_rows, dummy = out_F.shape[0], out_F
    inner, offset, table, dynamic = nf4 or (dummy, dummy, dummy, dummy)
    with current(x_D.device):
        quick(gemv_kernel)[(ceil_div(num_rows, rows),)](
            x_D,
            weight,
            dummy if scales is None else scales,
            dummy if zeros is None else zeros,
            inner,
            offset,
            table,
            dynamic,
            dummy if bias_F is None else bias_F,
            out_F,
            num_rows,
            WIDTH=x_D.shape[0],
            FORMAT=format_id,
            PER_BLOCK=per_block,
            ZEROS=has_zeros,
            BIAS=bias_F is not None,
            ROWS=rows,
            LANES=32 * warps,
            num_warps=warps,
            num_stages=1,
            enable_fp_fusion=True,
        )

"""The Triton kernel of products of 1 to 64 tokens with an int8, fp8 or int4 weight, by the tensor cores' own fragments.

A thread is written out: every tensor of the loop has one element for each thread, and the only layout that Triton has
for it gives element i to thread i. So the fragments of `mma.m16n8k16` are filled straight from 16-byte loads, and
nothing goes through shared memory. Lane 4 g + t of a warp holds, of a tile of 16 output rows,

    rows of the weight   g and g + 8          columns: its quarter t of a run, whichever, as long as x has the same
    token of the input   g (and 8 + g)        the same columns
    sums                 rows g and g + 8, tokens 2 t and 2 t + 1

The order of the columns inside a sum is free, so codes are multiplied where a load left them. They need no conversion:
under an exponent that makes the last mantissa bit 1 they are 128 + code (bfloat16) or 1024 + code (float16), exactly.
What that adds is taken off again by sums in float32:

    int4   d = sum of x (magic + code);  y += scale (d - (magic + zero) sum of x), for each group of columns; the sum
           of x is a product with ones
    int8   code = (magic + its low 7 bits) - (magic + its sign bit): two products
    fp8    sign, exponent and mantissa where x's dtype has them, the exponent 2^120 (bfloat16) or 2^8 (float16) too
           small; of the 2^120 the input takes 2^60, the result the rest

The warps of a program take every so many-th step of columns of the same rows (int4 256, else 128 columns), and are
added up at the end, in one order. Imported only where Triton is installed.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated, operator, index"
# Tuples grow in Triton's loops, and Triton knows no starred ones.
# ruff: noqa: RUF005

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.gemv_fragments_triton import (
    load_input,
    load_weight,
    low_bits,
    mma,
    pair_of,
    plane_of,
    side_by_side,
    sign_bits,
    times_2_to_60,
)
from tunesmith.kernels.gemv_triton import FP8, INT4
from tunesmith.kernels.launch import current, num_processors
from tunesmith.units import ceil_div

# Tokens by format. A program has 16 at most; others with the same rows run beside it and find them in the second cache.
MOST_TOKENS = {1: 32, 2: 32, 3: 64}
# Columns of a step by format (int8, fp8, int4): widths are multiples of them.
COLUMNS = {1: 128, 2: 128, 3: 256}
_log = logging.getLogger(__name__)


@triton.jit
def _weights(w, held, column, wanted, STRIDE: tl.constexpr, TILES: tl.constexpr, BY_HAND: tl.constexpr):
    # Of every tile's two rows the words at `column` and 16 words on.
    words = ()
    for i in tl.static_range(2 * TILES):
        words = words + (load_weight(w + held[i] * STRIDE + column, wanted, BY_HAND),)
    return words


@triton.jit
def _int4_step(acc, words, x, tokens, scales, zeros, held, step, wanted, place, zero, ones, S: tl.constexpr):
    """Two blocks of 128 columns: a group of columns after the other."""
    WIDTH: tl.constexpr = S[0]
    PER_BLOCK: tl.constexpr = S[1]
    ZEROS: tl.constexpr = S[2]
    TILES: tl.constexpr = S[3]
    TOKEN_TILES: tl.constexpr = S[4]
    WARPS: tl.constexpr = S[5]
    HALF: tl.constexpr = S[6]
    BY_HAND: tl.constexpr = S[7]
    GROUPS: tl.constexpr = WIDTH // 128 * PER_BLOCK
    added: tl.constexpr = 1024.0 if HALF else 128.0
    STEPS: tl.constexpr = WIDTH // 256
    # Behind the last step scales are 0, and the input is one that exists.
    always = tl.full([32 * WARPS], True, tl.int1)
    none = (zero, zero, zero, zero)
    for block in tl.static_range(2):
        values = ()
        for n in tl.static_range(TOKEN_TILES):
            at = x + tokens[n] + tl.minimum(step, STEPS - 1) * 128 + block * 64 + place * 2
            values = values + (load_input(at, always, True, BY_HAND),)
        pairs = ()
        for i in tl.static_range(2 * TILES):
            for half in tl.static_range(2):
                for e in tl.static_range(2):
                    p, q = words[i][4 * block + 2 * e], words[i][4 * block + 2 * e + 1]
                    pairs = pairs + (side_by_side(p, q, half, BY_HAND),)
        for part in tl.static_range(PER_BLOCK):
            sums = ()
            for _i in tl.static_range(TILES * TOKEN_TILES):
                sums = sums + (none,)
            inputs = ()
            for _i in tl.static_range(TOKEN_TILES):
                inputs = inputs + (none,)
            for plane in tl.static_range(part * 8 // PER_BLOCK, (part + 1) * 8 // PER_BLOCK):
                new, totals = (), ()
                for i in tl.static_range(TILES):
                    a0 = plane_of(pairs[8 * i + plane // 4 * 2], plane, HALF, BY_HAND)
                    a1 = plane_of(pairs[8 * i + 4 + plane // 4 * 2], plane, HALF, BY_HAND)
                    a2 = plane_of(pairs[8 * i + plane // 4 * 2 + 1], plane, HALF, BY_HAND)
                    a3 = plane_of(pairs[8 * i + 4 + plane // 4 * 2 + 1], plane, HALF, BY_HAND)
                    for n in tl.static_range(TOKEN_TILES):
                        b0, b1 = values[n][2 * plane], values[n][2 * plane + 1]
                        if i == 0:
                            one = mma(inputs[n], ones, ones, ones, ones, b0, b1, WARPS, HALF, BY_HAND)
                            totals = totals + (one,)
                        d = sums[i * TOKEN_TILES + n]
                        new = new + (mma(d, a0, a1, a2, a3, b0, b1, WARPS, HALF, BY_HAND),)
                sums, inputs = new, totals
            group = (step * 2 + block) * PER_BLOCK + part
            out = ()
            for i in tl.static_range(TILES):
                above, below = held[2 * i] * GROUPS + group, held[2 * i + 1] * GROUPS + group
                upper = tl.load(scales + above, mask=wanted, other=0.0).to(tl.float32)
                lower = tl.load(scales + below, mask=wanted, other=0.0).to(tl.float32)
                upper_zero, lower_zero = added + 8.0, added + 8.0
                if ZEROS:
                    upper_zero = tl.load(zeros + above, mask=wanted, other=0).to(tl.float32) + added
                    lower_zero = tl.load(zeros + below, mask=wanted, other=0).to(tl.float32) + added
                for n in tl.static_range(TOKEN_TILES):
                    d, old, total = sums[i * TOKEN_TILES + n], acc[i * TOKEN_TILES + n], inputs[n]
                    d0, d1 = d[0] - upper_zero * total[0], d[1] - upper_zero * total[1]
                    d2, d3 = d[2] - lower_zero * total[2], d[3] - lower_zero * total[3]
                    out = out + ((old[0] + upper * d0, old[1] + upper * d1, old[2] + lower * d2, old[3] + lower * d3),)
            acc = out
    return acc


@triton.jit
def _byte_step(acc, words, x, tokens, step, wanted, place, S: tl.constexpr, IS_FP8: tl.constexpr):
    """128 columns: a word of codes, four columns, at a time."""
    TILES: tl.constexpr = S[3]
    TOKEN_TILES: tl.constexpr = S[4]
    WARPS: tl.constexpr = S[5]
    HALF: tl.constexpr = S[6]
    BY_HAND: tl.constexpr = S[7]
    up: tl.constexpr = 7 if HALF else 4
    kept: tl.constexpr = -0x407F4080 if HALF else -0x780F7810  # 0xBF80BF80, 0x87F087F0
    values = ()
    for n in tl.static_range(TOKEN_TILES):
        value = load_input(x + tokens[n] + step * 64 + place * 8, wanted, False, BY_HAND)
        if IS_FP8 and not HALF:
            scaled = ()
            for i in tl.static_range(16):
                scaled = scaled + (times_2_to_60(value[i], BY_HAND),)
            value = scaled
        values = values + (value,)
    for word in tl.static_range(8):
        new = ()
        for i in tl.static_range(TILES):
            upper, lower = words[2 * i][word], words[2 * i + 1][word]
            p0, p1 = pair_of(upper, 0, IS_FP8, BY_HAND), pair_of(lower, 0, IS_FP8, BY_HAND)
            p2, p3 = pair_of(upper, 1, IS_FP8, BY_HAND), pair_of(lower, 1, IS_FP8, BY_HAND)
            for n in tl.static_range(TOKEN_TILES):
                b0, b1, d = values[n][2 * word], values[n][2 * word + 1], acc[i * TOKEN_TILES + n]
                if IS_FP8:
                    a0, a1, a2, a3 = (p0 << up) & kept, (p1 << up) & kept, (p2 << up) & kept, (p3 << up) & kept
                else:
                    a0, a1 = low_bits(p0, HALF, BY_HAND), low_bits(p1, HALF, BY_HAND)
                    a2, a3 = low_bits(p2, HALF, BY_HAND), low_bits(p3, HALF, BY_HAND)
                    s0, s1 = sign_bits(p0, HALF, BY_HAND), sign_bits(p1, HALF, BY_HAND)
                    s2, s3 = sign_bits(p2, HALF, BY_HAND), sign_bits(p3, HALF, BY_HAND)
                    d = mma(d, s0, s1, s2, s3, b0, b1, WARPS, HALF, BY_HAND)
                new = new + (mma(d, a0, a1, a2, a3, b0, b1, WARPS, HALF, BY_HAND),)
        acc = new
    return acc


@triton.jit(do_not_specialize=["num_tokens"])
def quad_kernel(
    x,
    w,
    scales,
    zeros,
    bias,
    out,
    num_rows,
    num_tokens,
    WIDTH: tl.constexpr,
    FORMAT: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    TILES: tl.constexpr,
    TOKEN_TILES: tl.constexpr,
    WARPS: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    """out[t, f] = sum of x[t, k] w[f, k] (+ bias[f]), x and w as int32 words.

    A program has 16 TILES rows of w and 8 TOKEN_TILES tokens.
    Rows and tokens that are not there are others once more, and are not stored.
    """
    HALF: tl.constexpr = out.dtype.element_ty == tl.float16
    S: tl.constexpr = (WIDTH, PER_BLOCK, ZEROS, TILES, TOKEN_TILES, WARPS, HALF, BY_HAND)
    IS_INT4: tl.constexpr = FORMAT == INT4
    WORDS: tl.constexpr = WIDTH // 8 if IS_INT4 else WIDTH // 4  # of a row
    STEPS: tl.constexpr = WORDS // 32
    thread = tl.arange(0, 32 * WARPS)
    warp, quad, place = thread // 32, thread % 32 // 4, thread % 4
    zero = tl.zeros([32 * WARPS], tl.float32)
    ones = tl.full([32 * WARPS], 0x3C003C00 if HALF else 0x3F803F80, tl.int32)
    first_token, first = tl.program_id(0) * 8 * TOKEN_TILES, tl.program_id(1) * 16 * TILES
    held = ()
    for i in tl.static_range(2 * TILES):
        held = held + (tl.minimum(first + 8 * i + quad, num_rows - 1).to(tl.int64),)
    tokens = ()
    for n in tl.static_range(TOKEN_TILES):
        tokens = tokens + (tl.minimum(first_token + 8 * n + quad, num_tokens - 1) * (WIDTH // 2),)
    acc = ()
    for _i in tl.static_range(TILES * TOKEN_TILES):
        acc = acc + ((zero, zero, zero, zero),)
    words = _weights(w, held, warp * 32 + place * 4, warp < STEPS, WORDS, TILES, BY_HAND)
    for start in range(0, STEPS, WARPS):
        step = start + warp
        # The next step's weights are under way while this one's are multiplied.
        next_step = step + WARPS
        following = _weights(w, held, next_step * 32 + place * 4, next_step < STEPS, WORDS, TILES, BY_HAND)
        wanted = step < STEPS
        if IS_INT4:
            acc = _int4_step(acc, words, x, tokens, scales, zeros, held, step, wanted, place, zero, ones, S)
        else:
            acc = _byte_step(acc, words, x, tokens, step, wanted, place, S, FORMAT == FP8)
        words = following
    lane = tl.arange(0, 32)
    for i in tl.static_range(TILES):
        for lower in tl.static_range(2):
            row = first + 16 * i + 8 * lower + lane // 4
            inside = row < num_rows
            factor = tl.full([32], 1.0, tl.float32)
            added = tl.zeros([32], tl.float32)
            if not IS_INT4:
                factor = tl.load(scales + row, mask=inside, other=0.0)
                if FORMAT == FP8:
                    factor *= 256.0 if HALF else 1152921504606846976.0
            if BIAS:
                added = tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
            for n in tl.static_range(TOKEN_TILES):
                for odd in tl.static_range(2):
                    d = acc[i * TOKEN_TILES + n][2 * lower + odd]
                    y = tl.sum(tl.reshape(d, [WARPS, 32]), axis=0) * factor + added
                    token = first_token + 8 * n + lane % 4 * 2 + odd
                    at = out + token * num_rows + row
                    tl.store(at, y.to(out.dtype.element_ty), mask=inside & (token < num_tokens))


def takes_quads(format_id: int, x_TD: Tensor) -> bool:
    """Whether the kernel has this product: int8, fp8 or int4, few tokens, whole steps of columns in 16 bits."""
    step = COLUMNS.get(format_id)
    if (
        step is None
        or x_TD.dtype.itemsize != 2
        or not 0 < x_TD.shape[0] <= MOST_TOKENS[format_id]
        or x_TD.shape[1] % step
    ):
        return False
    return x_TD.device.type != "cuda" or _has_fragments(x_TD.device)


@cache
def _has_fragments(device: torch.device) -> bool:
    """Fragments of this size in both dtypes: from compute capability 8.0 on."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def shape_of(format_id: int, num_rows: int, width: int, processors: int) -> tuple[int, int]:
    """Tiles of 16 rows and warps of a program.

    Two tiles share what is loaded of the input, where there are rows enough. Warps until every processor has 12 of
    them, so that bytes enough are under way: a warp has 2 KiB of each tile's weight before it, and 2 KiB on its way.
    """
    tiles = 2 if num_rows >= 64 * processors else 1
    programs, steps = ceil_div(num_rows, 16 * tiles), width // COLUMNS[format_id]
    warps = 2
    while warps < 16 and 2 * warps <= steps and programs * warps < 12 * processors:
        warps *= 2
    return tiles, warps


def quads(
    format_id: int,
    x_TD: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias_F: Tensor | None,
    out_TF: Tensor,
    *,
    per_block: int = 1,
    shape: tuple[int, int] | None = None,
) -> bool:
    """Launch the kernel: a few tokens' product into `out_TF`, of what `takes_quads`. x contiguous.

    shape: tiles and warps of a program (None: by `shape_of`).
    Returns: whether the result is right. Not where a version of Triton moves the loop's values between threads.
    """
    num_tokens, num_rows = out_TF.shape
    width = x_TD.shape[1]
    tiles, warps = shape or shape_of(format_id, num_rows, width, num_processors(x_TD.device))
    token_tiles = 1 if num_tokens <= 8 else 2
    with current(x_TD.device):
        compiled = quad_kernel[(ceil_div(num_tokens, 8 * token_tiles), ceil_div(num_rows, 16 * tiles))](
            x_TD.view(torch.int32),
            weight.view(torch.int32),
            scales,
            out_TF if zeros is None else zeros,
            out_TF if bias_F is None else bias_F,
            out_TF,
            num_rows,
            num_tokens,
            WIDTH=width,
            FORMAT=format_id,
            PER_BLOCK=per_block,
            ZEROS=zeros is not None,
            BIAS=bias_F is not None,
            TILES=tiles,
            TOKEN_TILES=token_tiles,
            WARPS=warps,
            BY_HAND=x_TD.device.type != "cpu",  # Triton's interpreter has no assembler
            num_warps=warps,
            num_stages=1,
            enable_fp_fusion=True,
        )
    return compiled is None or _stays_in_threads(compiled)


def stays_in_threads(ttgir: str) -> bool:
    """Whether a compiled kernel has one layout up to its last product, so that a thread's values are its own."""
    last_product = ttgir.rfind("mma.sync")
    return last_product >= 0 and "convert_layout" not in ttgir[: max(last_product, ttgir.rfind("scf.yield"))]


_checked: dict[int, tuple[Any, bool]] = {}


def _stays_in_threads(compiled: Any) -> bool:
    """`stays_in_threads` of a compiled kernel, read once."""
    known = _checked.get(id(compiled))
    if known is None:
        asm = getattr(compiled, "asm", {})
        known = _checked[id(compiled)] = compiled, "ttgir" not in asm or stays_in_threads(asm["ttgir"])
        if not known[1]:
            _log.warning("products of few tokens by fragments are off: this Triton moves values between threads")
    return known[1]

"""A step of columns in `gemv_quads_triton`: what a thread loads of the weight for it, and the products, by format.

S, in order: width, groups of a block, zero points, eights of rows, eights of tokens, warps, float16, assembler,
format, scales in float16.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated, operator, index"
# Tuples grow in Triton's loops, and Triton knows no starred ones.
# ruff: noqa: RUF005

from __future__ import annotations

import triton.language as tl

from tunesmith.kernels.gemv_fragments_triton import (
    halves,
    load_input,
    load_operands,
    load_weight,
    low_bits,
    mma,
    pair_of,
    plane_of,
    side_by_side,
    sign_bits,
    times_2_to_60,
)
from tunesmith.kernels.gemv_triton import FLOAT, INT4
from tunesmith.kernels.jit import jit


@jit
def of_step(w, scales, zeros, held, step, place, S: tl.constexpr):
    """What a step needs that no other kernel writes: of every row 8 words; int4: its scales, and its zero points."""
    WIDTH: tl.constexpr = S[0]
    PER_BLOCK: tl.constexpr = S[1]
    ZEROS: tl.constexpr = S[2]
    OCTETS: tl.constexpr = S[3]
    BY_HAND: tl.constexpr = S[7]
    FORMAT: tl.constexpr = S[8]
    WORDS: tl.constexpr = WIDTH // 8 if FORMAT == INT4 else (WIDTH // 2 if FORMAT == FLOAT else WIDTH // 4)
    wanted = step < WORDS // 32
    words, factors, offsets = (), (), ()
    for i in tl.static_range(OCTETS):
        at = w + held[i] * WORDS + step * 32 + place * 4
        words = words + (load_weight(at, wanted, FORMAT == FLOAT, BY_HAND),)
        if FORMAT == INT4:
            # Of a step's two blocks, two scales and zero points at a time: a word and half a word.
            pair = held[i] * (WORDS // 32 * PER_BLOCK) + step * PER_BLOCK
            for j in tl.static_range(PER_BLOCK):
                factors = factors + (tl.load(scales + pair + j, mask=wanted, other=0),)
                if ZEROS:
                    offsets = offsets + (tl.load(zeros + pair + j, mask=wanted, other=0).to(tl.int32),)
    return words, factors, offsets


@jit
def int4_step(acc, ahead, x, tokens, step, place, zero, ones, S: tl.constexpr):
    """Two blocks of 128 columns: a group of columns after the other."""
    WIDTH: tl.constexpr = S[0]
    PER_BLOCK: tl.constexpr = S[1]
    ZEROS: tl.constexpr = S[2]
    OCTETS: tl.constexpr = S[3]
    TOKEN_TILES: tl.constexpr = S[4]
    WARPS: tl.constexpr = S[5]
    HALF: tl.constexpr = S[6]
    BY_HAND: tl.constexpr = S[7]
    SCALE_HALF: tl.constexpr = S[9]
    TILES: tl.constexpr = (OCTETS + 1) // 2
    DOWN: tl.constexpr = 4 if OCTETS > 1 else 0
    words, factors, offsets = ahead
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
        for i in tl.static_range(OCTETS):
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
                    a1 = plane_of(pairs[8 * i + DOWN + plane // 4 * 2], plane, HALF, BY_HAND)
                    a2 = plane_of(pairs[8 * i + plane // 4 * 2 + 1], plane, HALF, BY_HAND)
                    a3 = plane_of(pairs[8 * i + DOWN + plane // 4 * 2 + 1], plane, HALF, BY_HAND)
                    for n in tl.static_range(TOKEN_TILES):
                        b0, b1 = values[n][2 * plane], values[n][2 * plane + 1]
                        if i == 0:
                            one = mma(inputs[n], ones, ones, ones, ones, b0, b1, WARPS, HALF, BY_HAND)
                            totals = totals + (one,)
                        d = sums[i * TOKEN_TILES + n]
                        new = new + (mma(d, a0, a1, a2, a3, b0, b1, WARPS, HALF, BY_HAND),)
                sums, inputs = new, totals
            out = ()
            for i in tl.static_range(TILES):
                # Of the step's groups this one, which are held in pairs.
                above = factors[2 * i * PER_BLOCK + (block * PER_BLOCK + part) // 2]
                below = factors[(2 * i + (OCTETS > 1)) * PER_BLOCK + (block * PER_BLOCK + part) // 2]
                upper = halves(above, SCALE_HALF)[(block * PER_BLOCK + part) % 2]
                lower = halves(below, SCALE_HALF)[(block * PER_BLOCK + part) % 2]
                upper_zero, lower_zero = added + 8.0, added + 8.0
                if ZEROS:
                    above = offsets[2 * i * PER_BLOCK + (block * PER_BLOCK + part) // 2]
                    below = offsets[(2 * i + (OCTETS > 1)) * PER_BLOCK + (block * PER_BLOCK + part) // 2]
                    upper_zero = ((above >> (8 * ((block * PER_BLOCK + part) % 2))) & 255).to(tl.float32) + added
                    lower_zero = ((below >> (8 * ((block * PER_BLOCK + part) % 2))) & 255).to(tl.float32) + added
                for n in tl.static_range(TOKEN_TILES):
                    d, old, total = sums[i * TOKEN_TILES + n], acc[i * TOKEN_TILES + n], inputs[n]
                    d0, d1 = d[0] - upper_zero * total[0], d[1] - upper_zero * total[1]
                    d2, d3 = d[2] - lower_zero * total[2], d[3] - lower_zero * total[3]
                    out = out + ((old[0] + upper * d0, old[1] + upper * d1, old[2] + lower * d2, old[3] + lower * d3),)
            acc = out
    return acc


@jit
def float_step(acc, words, x, tokens, step, wanted, place, S: tl.constexpr):
    """64 columns of 16 bits, of the weight and of the input alike."""
    OCTETS: tl.constexpr = S[3]
    TOKEN_TILES: tl.constexpr = S[4]
    WARPS: tl.constexpr = S[5]
    HALF: tl.constexpr = S[6]
    BY_HAND: tl.constexpr = S[7]
    values = ()
    for n in tl.static_range(TOKEN_TILES):
        values = values + (load_operands(x + tokens[n] + step * 32 + place * 4, wanted, BY_HAND),)
    for pair in tl.static_range(4):
        new = ()
        for i in tl.static_range((OCTETS + 1) // 2):
            upper, lower = words[2 * i], words[2 * i + (OCTETS > 1)]
            for n in tl.static_range(TOKEN_TILES):
                b0, b1, d = values[n][2 * pair], values[n][2 * pair + 1], acc[i * TOKEN_TILES + n]
                a0, a1, a2, a3 = upper[2 * pair], lower[2 * pair], upper[2 * pair + 1], lower[2 * pair + 1]
                new = new + (mma(d, a0, a1, a2, a3, b0, b1, WARPS, HALF, BY_HAND),)
        acc = new
    return acc


@jit
def byte_step(acc, words, x, tokens, step, wanted, place, S: tl.constexpr, IS_FP8: tl.constexpr):
    """128 columns: a word of codes, four columns, at a time."""
    OCTETS: tl.constexpr = S[3]
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
        for i in tl.static_range((OCTETS + 1) // 2):
            upper, lower = words[2 * i][word], words[2 * i + (OCTETS > 1)][word]
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

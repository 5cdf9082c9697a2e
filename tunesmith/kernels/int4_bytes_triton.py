"""The Triton kernel of products of int4 weights with an input in two bytes a value, by the integer tensor cores.

A thread is written out, as in gemv_quads_triton.py: every tensor of the loop has one element for each thread. Lane
4 g + t of a warp holds, of `mma.m16n8k32` with a tile of 16 rows of the weight,

    rows of the weight     g and g + 8             columns: its quarter t of a block, four words of each row
    column g of the input  part g / 2, byte g % 2  the same columns
    sums                   rows g and g + 8, of columns 2 t and 2 t + 1: the high bytes and the low of part t

Codes are not converted. The even nibbles of a word are four unsigned bytes (w & 0x0F0F0F0F), the odd ones are sixteen
times their codes (w & 0xF0F0F0F0) and have sums of their own. A group's sum of a token is, in integers and exactly,

    16 d = 256 (16 even + odd of the high bytes) + (16 even + odd of the low bytes)
    y   += scale of w * scale of x * (16 d - zero * 16 sum of the input's codes) / 16

The four parts of a tile of eight columns are tokens (groups of 128), or of each token the groups of a block: there a
part's bytes are masked to its own group, so that a sum is of one group, and lane t has that group's scale. The warps of
a program take every so many-th step of 256 columns, and are added up at the end, in one order.

A step's registers are loaded again, with what AHEAD steps later is multiplied, as soon as it was multiplied. OVERLAP:
as there: the first steps' weights are asked for before the kernel that writes the input is through.
Imported only where Triton is installed.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated, operator, index, misc"
# Tuples grow in Triton's loops, and Triton knows no starred ones.
# ruff: noqa: RUF005

from __future__ import annotations

import triton.language as tl

from tunesmith.kernels.gemv_fragments_triton import load_weight, once_asked_for, when_earlier_is_through
from tunesmith.kernels.jit import jit
from tunesmith.kernels.x_bytes_layout import BLOCK_WORDS

_BLOCK = tl.constexpr(BLOCK_WORDS)
MMA = tl.constexpr(
    "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)
# Of a block: four words of even columns, and four of odd ones.
LOAD_X = tl.constexpr("ld.global.v4.b32 {$0, $1, $2, $3}, [$8]; ld.global.v4.b32 {$4, $5, $6, $7}, [$8 + 64];")
LOAD_TWO = tl.constexpr("ld.global.v2.b32 {$0, $1}, [$2];")
# Zero points of one group, or of two: what is not wanted is any, as its scale is 0.
LOAD_ZEROS = tl.constexpr(
    [f"{{ .reg .pred p; setp.ne.b32 p, $2, 0; @p ld.global.{kind} $0, [$1]; }}" for kind in ("u16", "u8")]
)


@jit
def _products(a, b, WARPS: tl.constexpr):
    # sums[w, g, n] of the four bytes in the words of lanes (g, t) of the one and (n, t) of the other, over t
    place = 8 * tl.arange(0, 4)[None, :]
    rows = tl.reshape((a[:, None] >> place) & 255, [WARPS, 8, 1, 16])
    columns = tl.reshape((b[:, None] << (24 - place)) >> 24, [WARPS, 1, 8, 16])
    return tl.sum(rows * columns, axis=3)


@jit
def mma(d, a0, a1, a2, a3, b0, b1, WARPS: tl.constexpr, BY_HAND: tl.constexpr):
    """d + a @ b of every warp, of unsigned bytes and signed ones: a's rows g and g + 8 in a0, a2 and in a1, a3."""
    if BY_HAND:
        # Not pure: it must stay where all lanes of a warp are.
        return tl.inline_asm_elementwise(
            MMA,
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
            [a0, a1, a2, a3, b0, b1, d[0], d[1], d[2], d[3]],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,
            pack=1,
        )
    upper = _products(a0, b0, WARPS) + _products(a2, b1, WARPS)
    lower = _products(a1, b0, WARPS) + _products(a3, b1, WARPS)
    # Columns 2 t and 2 t + 1 of row g are lane 4 g + t's.
    d0, d1 = tl.split(tl.reshape(upper, [32 * WARPS, 2]))
    d2, d3 = tl.split(tl.reshape(lower, [32 * WARPS, 2]))
    return d[0] + d0, d[1] + d1, d[2] + d2, d[3] + d3


@jit
def load_x(pointer, BY_HAND: tl.constexpr):
    """Four words of even columns, and four of odd ones, of one byte of the values."""
    if BY_HAND:
        # Pure: it may be loaded once for all that use it; not before `pointer`, which the barrier gives.
        return tl.inline_asm_elementwise(
            LOAD_X,
            "=r,=r,=r,=r,=r,=r,=r,=r,l",
            [pointer.to(tl.int64)],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    words = ()
    for i in tl.static_range(8):
        words = words + (tl.load(pointer + (i // 4 * 16 + i % 4)),)
    return words


@jit
def load_scale(pointer, at, PARTS: tl.constexpr, BY_HAND: tl.constexpr):
    """Of a block and a part: the scale, and minus 16 times the sum of the codes. at: the sum's place behind it."""
    if BY_HAND and PARTS == 1:
        return tl.inline_asm_elementwise(
            LOAD_TWO, "=r,=r,l", [pointer.to(tl.int64)], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    return tl.load(pointer), tl.load(pointer + at)


@jit
def load_zeros(pointer, wanted, PARTS: tl.constexpr, BY_HAND: tl.constexpr):
    """A word whose lowest byte, or two, are zero points."""
    if BY_HAND:
        return tl.inline_asm_elementwise(
            LOAD_ZEROS[PARTS > 1],
            "=r,l,r",
            [pointer.to(tl.int64), wanted.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    return tl.load(pointer, mask=wanted, other=0).to(tl.int32)


@jit
def of_step(w, scales, zeros, at_w, at_group, wanted, S: tl.constexpr):
    """What a step needs that no other kernel writes: of both rows eight words, two scales, two zero points."""
    PARTS: tl.constexpr = S[0]
    ZEROS: tl.constexpr = S[1]
    BY_HAND: tl.constexpr = S[3]
    words, factors, offsets = (), (), ()
    for i in tl.static_range(2):
        words = words + (load_weight(w + at_w[i], wanted, False, BY_HAND),)
        if PARTS == 1:
            # Of a step's two blocks at a time: a word, and half a word.
            factors = factors + (tl.load(scales + at_group[i], mask=wanted, other=0),)
            if ZEROS:
                offsets = offsets + (load_zeros(zeros + at_group[i], wanted, PARTS, BY_HAND),)
        else:
            for block in tl.static_range(2):
                at = at_group[i] + block * PARTS
                factors = factors + (tl.load(scales + at, mask=wanted, other=0),)
                if ZEROS:
                    offsets = offsets + (load_zeros(zeros + at, wanted, PARTS, BY_HAND),)
    return words, factors, offsets


@jit
def wide(scale, HALF: tl.constexpr):
    """A scale in 16 bits (the lower ones of a word), in float32."""
    if HALF:
        return scale.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return (scale.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@jit
def factor_of(ahead, row: tl.constexpr, block: tl.constexpr, S: tl.constexpr):
    """Scale in float32 and zero point of a row's group in a block, this lane's."""
    PARTS: tl.constexpr = S[0]
    ZEROS: tl.constexpr = S[1]
    SCALE_HALF: tl.constexpr = S[2]
    zero = 8
    if PARTS == 1:
        pair = ahead[1][row]
        if SCALE_HALF:
            scale = wide(pair >> (16 * block), True)
        else:
            scale = (pair << 16 if block == 0 else pair & -65536).to(tl.float32, bitcast=True)
        if ZEROS:
            zero = (ahead[2][row] >> (8 * block)) & 255
    else:
        scale = wide(ahead[1][2 * row + block], SCALE_HALF)
        if ZEROS:
            zero = ahead[2][2 * row + block]
    return scale, zero


@jit
def bytes_step(acc, ahead, x, tokens, parts, mask, behind, nothing, S: tl.constexpr):
    """Two blocks of 128 columns, with all tiles of tokens: what they add to each lane's two sums of a tile."""
    PARTS: tl.constexpr = S[0]
    BY_HAND: tl.constexpr = S[3]
    WARPS: tl.constexpr = S[4]
    TILES: tl.constexpr = S[5]
    LOW: tl.constexpr = 0x0F0F0F0F
    HIGH: tl.constexpr = -0x0F0F0F10  # 0xF0F0F0F0
    none = (nothing, nothing, nothing, nothing)
    upper, lower = ahead[0]
    for block in tl.static_range(2):
        new = ()
        for n in tl.static_range(TILES):
            b = load_x(x + tokens[n] + block * _BLOCK, BY_HAND)
            even, odd = none, none
            for pair in tl.static_range(2):
                b0, b1, c0, c1 = b[2 * pair], b[2 * pair + 1], b[2 * pair + 4], b[2 * pair + 5]
                if PARTS > 1:
                    b0, b1, c0, c1 = b0 & mask, b1 & mask, c0 & mask, c1 & mask
                p, q = upper[4 * block + 2 * pair], lower[4 * block + 2 * pair]
                r, s = upper[4 * block + 2 * pair + 1], lower[4 * block + 2 * pair + 1]
                even = mma(even, p & LOW, q & LOW, r & LOW, s & LOW, b0, b1, WARPS, BY_HAND)
                odd = mma(odd, p & HIGH, q & HIGH, r & HIGH, s & HIGH, c0, c1, WARPS, BY_HAND)
            scale_x, total = load_scale(x + parts[n] + block * _BLOCK, behind, PARTS, BY_HAND)
            scale_x = scale_x.to(tl.float32, bitcast=True)
            sums = ()
            for row in tl.static_range(2):
                scale, zero = factor_of(ahead, row, block, S)
                high, low = even[2 * row] * 16 + odd[2 * row], even[2 * row + 1] * 16 + odd[2 * row + 1]
                d = (high * 256 + low) + zero * total
                sums = sums + (acc[n][row] + d.to(tl.float32) * (scale * scale_x),)
            new = new + (sums,)
        acc = new
    return acc


@jit(do_not_specialize=["num_tokens"])
def bytes_kernel(
    x,
    w,
    scales,
    zeros,
    bias,
    out,
    num_rows,
    num_tokens,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE_HALF: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,
    BY_HAND: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[t, f] = sum of x[t, k] w[f, k] (+ bias[f]), x as kernels/x_bytes.py has it, w as kernels/int4.py.

    w as int32 words; with groups of 128 scales are int32 words and zero points int16 words, of two groups each.
    A program has 16 rows and TILES tiles of 4 / PARTS tokens. Rows and tokens that are not there are others once more.
    """
    S: tl.constexpr = (PARTS, ZEROS, SCALE_HALF, BY_HAND, WARPS, TILES)
    STEPS: tl.constexpr = WIDTH // 256
    PER_TILE: tl.constexpr = 4 // PARTS
    GROUPS: tl.constexpr = 1 if PARTS == 1 else 2 * PARTS  # what a step has of a row's scales, as they are loaded
    thread = tl.arange(0, 32 * WARPS)
    warp, quad, place = thread // 32, thread % 32 // 4, thread % 4
    zero = tl.zeros([32 * WARPS], tl.float32)
    nothing = tl.zeros([32 * WARPS], tl.int32)
    first_token, first = tl.program_id(0) * PER_TILE * TILES, tl.program_id(1) * 16
    row = tl.minimum(first + quad, num_rows - 1)
    below = row + 8 if EVEN_ROWS else tl.minimum(first + 8 + quad, num_rows - 1)
    at_w, at_group = (), ()
    for i in tl.static_range(2):
        of_row = (below if i == 1 else row).to(tl.int64)
        at_w = at_w + (of_row * (WIDTH // 8) + warp * 32 + place * 4,)
        at_group = at_group + (of_row * (STEPS * GROUPS) + warp * GROUPS + place % PARTS,)
    tokens, parts = (), ()
    for n in tl.static_range(TILES):
        of_x = tl.minimum(first_token + n * PER_TILE + quad // 2 // PARTS, num_tokens - 1)
        tokens = tokens + (of_x * (2 * STEPS * _BLOCK) + quad % 2 * 32 + place * 4,)
        of_sum = tl.minimum(first_token + n * PER_TILE + place // PARTS, num_tokens - 1)
        parts = parts + (of_sum * (2 * STEPS * _BLOCK) + 64,)
    # The bytes of a word that are of this lane's group, and where that group's sum is.
    SHIFT: tl.constexpr = 32 // PARTS
    mask = nothing
    if PARTS > 1:
        mask = ((1 << SHIFT) - 1) << (quad // 2 % PARTS * SHIFT)
    behind = PARTS + place % PARTS
    acc, ahead = (), ()
    for _n in tl.static_range(TILES):
        acc = acc + ((zero, zero),)
    for j in tl.static_range(AHEAD):
        wanted = j * WARPS + warp < STEPS
        to_w = (at_w[0] + j * WARPS * 32, at_w[1] + j * WARPS * 32)
        to_group = (at_group[0] + j * WARPS * GROUPS, at_group[1] + j * WARPS * GROUPS)
        ahead = ahead + (of_step(w, scales, zeros, to_w, to_group, wanted, S),)
    here = once_asked_for(place, BY_HAND)  # of what is loaded above, nothing is used above
    if OVERLAP:
        here = when_earlier_is_through(here)
    here -= place  # nothing, but not before what is above
    for start in range(0, STEPS, WARPS * AHEAD):
        following = ()
        for j in tl.static_range(AHEAD):
            step = start + j * WARPS + warp
            # Behind the last step scales are 0, and the input is one that exists.
            at_x = tl.minimum(step, STEPS - 1) * (2 * _BLOCK) + here
            now_tokens, now_parts = (), ()
            for n in tl.static_range(TILES):
                now_tokens, now_parts = now_tokens + (tokens[n] + at_x,), now_parts + (parts[n] + at_x,)
            acc = bytes_step(acc, ahead[j], x, now_tokens, now_parts, mask, behind, nothing, S)
            if STEPS > WARPS * AHEAD:
                far = start + (j + AHEAD) * WARPS
                to_w = (at_w[0] + far * 32, at_w[1] + far * 32)
                to_group = (at_group[0] + far * GROUPS, at_group[1] + far * GROUPS)
                following = following + (of_step(w, scales, zeros, to_w, to_group, far + warp < STEPS, S),)
                here = once_asked_for(here, BY_HAND)
            else:
                following = following + (ahead[j],)
        ahead = following
    fragment_row = tl.arange(0, 8)[:, None, None]
    token_of = tl.arange(0, PER_TILE)[None, :, None]
    at = first + fragment_row + 8 * tl.arange(0, 2)[None, None, :]
    for n in tl.static_range(TILES):
        y = tl.reshape(tl.join(acc[n][0], acc[n][1]), [WARPS, 8, PER_TILE, PARTS, 2])
        y = tl.sum(tl.sum(y, axis=3), axis=0) * 0.0625
        if BIAS:
            y += tl.load(bias + at, mask=at < num_rows, other=0.0).to(tl.float32)
        token = first_token + n * PER_TILE + token_of
        inside = (at < num_rows) & (token < num_tokens)
        tl.store(out + token * num_rows + at, y.to(out.dtype.element_ty), mask=inside)

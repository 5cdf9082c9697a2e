"""How a program of `gemv_quads_triton` ends where it reads a norm, or writes the stream: of at most 8 tokens, 16 rows.

See kernels/stream_products.py. Lane 4 g + t of every warp has sums of rows g and g + 8, tokens 2 t and 2 t + 1. They
are added up over the warps in one go, together with the squares of which a token's factor is made; then warp c of the
first four finishes rows 8 (c / 2) + g and tokens 2 t + c % 2. Where both rows belong together (gates), or there are
fewer warps, warp c of the first two has both.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated, operator, index"
# Tuples grow in Triton's loops, and Triton knows no starred ones.
# ruff: noqa: RUF005

from __future__ import annotations

import triton.language as tl

from tunesmith.kernels.gemv_triton import FLOAT, FP8
from tunesmith.kernels.jit import jit

# Who is launched next may begin (and ask for its weights); what was launched before has written what is read here.
EARLY = tl.constexpr("griddepcontrol.launch_dependents; griddepcontrol.wait; mov.b32 $0, $1;")
# Not ld.global.nc, see `gemv_fragments_triton`.
FOUR = tl.constexpr(
    "{ .reg .pred p; setp.ne.b32 p, $5, 0; mov.f32 $0, 0f00000000; mov.f32 $1, 0f00000000; mov.f32 $2, 0f00000000; "
    "mov.f32 $3, 0f00000000; @p ld.global.v4.f32 {$0, $1, $2, $3}, [$4]; }"
)
PREFETCH = tl.constexpr("{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, $2; }")
WHICH = tl.constexpr("mov.u32 $0, %ctaid.y;")


@jit
def early_when_earlier_is_through(place):
    """`place`, once the kernel launched before is through; the one launched next may begin at once."""
    return tl.inline_asm_elementwise(EARLY, "=r,r", [place], dtype=tl.int32, is_pure=False, pack=1)


@jit
def _program_again(num_rows, BY_HAND: tl.constexpr):
    """The program's place among those of the rows, read anew: kept, it would take a register from the loop."""
    if BY_HAND:
        return tl.inline_asm_elementwise(WHICH, "=r,r", [num_rows], dtype=tl.int32, is_pure=False, pack=1)
    return tl.program_id(1)


@jit
def rows_to_finish(first, warp, quad, num_rows, ROWS: tl.constexpr, WARPS: tl.constexpr, GATED: tl.constexpr):
    """The rows whose sums a thread finishes, each with whether there is such a row."""
    BOTH: tl.constexpr = GATED or WARPS < 4 or ROWS < 16
    COUNT: tl.constexpr = 2 if BOTH and ROWS >= 16 else 1
    found = ()
    for k in tl.static_range(COUNT):
        if GATED:
            row, inside = first + quad + k * (num_rows // 2), first + quad < num_rows // 2
        else:
            row = first + quad + 8 * (k if BOTH else warp // 2 % 2)
            inside = row < num_rows
        found = found + ((row, inside & (warp < (2 if BOTH else 4))),)
    return found


@jit
def of_rows(pointer, rows, IS_THERE: tl.constexpr):
    """A value of each row that a thread finishes; where there are none, none is loaded."""
    found = ()
    for k in tl.static_range(len(rows)):
        if IS_THERE:
            found = found + (tl.load(pointer + rows[k][0], mask=rows[k][1], other=0.0).to(tl.float32),)
    return found


@jit
def on_their_way(pointer, rows, WANTED: tl.constexpr):
    """Ask for a value of each of these rows, without registers to hold it: the second cache is to have it."""
    for k in tl.static_range(len(rows)):
        if WANTED:
            at, wanted = (pointer + rows[k][0]).to(tl.int64), rows[k][1].to(tl.int32)
            tl.inline_asm_elementwise(PREFETCH, "=r,l,r", [at, wanted], dtype=tl.int32, is_pure=False, pack=1)


@jit
def _four(pointer, wanted, BY_HAND: tl.constexpr):
    if BY_HAND:
        return tl.inline_asm_elementwise(
            FOUR,
            "=f,=f,=f,=f,l,r",
            [pointer.to(tl.int64), wanted.to(tl.int32)],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=False,
            pack=1,
        )
    values = ()
    for i in tl.static_range(4):
        values = values + (tl.load(pointer + i, mask=wanted, other=0.0),)
    return values


@jit
def squares_of_thread(squares, thread, num_tokens, PARTS: tl.constexpr, WARPS: tl.constexpr, BY_HAND: tl.constexpr):
    """Squares that a thread adds up, four beside each other, of tokens 2 t and 2 t + 1."""
    found = ()
    for i in tl.static_range((PARTS + 32 * WARPS - 1) // (32 * WARPS)):
        part = i * 32 * WARPS + thread // 4 * 4
        for odd in tl.static_range(2):
            token = tl.minimum(thread % 4 * 2 + odd, num_tokens - 1)
            found = found + (_four(squares + token * PARTS + part, part < PARTS, BY_HAND),)
    return found


@jit
def _add_four(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@jit
def _add_six(a0, a1, a2, a3, a4, a5, b0, b1, b2, b3, b4, b5):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5


@jit
def _by_warp(value, WARPS: tl.constexpr):
    return tl.reshape(value, [WARPS, 32])


@jit
def _for_all(value, WARPS: tl.constexpr):
    # Of each lane, in every warp.
    return tl.reshape(tl.broadcast_to(value[None, :], [WARPS, 32]), [32 * WARPS])


@jit
def _over_warps(d, squares, NORMED: tl.constexpr, WARPS: tl.constexpr, BY_HAND: tl.constexpr):
    # Sums of every lane over the warps; NORMED: of the squares of its two tokens too.
    d0, d1, d2, d3 = _by_warp(d[0], WARPS), _by_warp(d[1], WARPS), _by_warp(d[2], WARPS), _by_warp(d[3], WARPS)
    if NORMED:
        even = tl.zeros([32 * WARPS], tl.float32)
        odd = even
        for i in tl.static_range(len(squares) // 2):
            a, b = squares[2 * i], squares[2 * i + 1]
            even += (a[0] + a[1]) + (a[2] + a[3])
            odd += (b[0] + b[1]) + (b[2] + b[3])
        even, odd = _by_warp(even, WARPS), _by_warp(odd, WARPS)
        if BY_HAND:
            sums = tl.reduce((d0, d1, d2, d3, even, odd), 0, _add_six)
        else:  # the interpreter would add pair by pair
            sums = tl.sum(d0, 0), tl.sum(d1, 0), tl.sum(d2, 0), tl.sum(d3, 0), tl.sum(even, 0), tl.sum(odd, 0)
    elif BY_HAND:
        sums = tl.reduce((d0, d1, d2, d3), 0, _add_four)
    else:
        sums = tl.sum(d0, 0), tl.sum(d1, 0), tl.sum(d2, 0), tl.sum(d3, 0)
    return sums


@jit
def _over_quads(value, WARPS: tl.constexpr):
    # [32] of lanes to the sum over g, in every thread.
    total = tl.sum(tl.reshape(value, [8, 4]), axis=0)
    return tl.reshape(tl.broadcast_to(total[None, None, :], [WARPS, 8, 4]), [32 * WARPS])


@jit
def _finished(d, squares, eps, factors, biases, rows, warp, NORMED: tl.constexpr, S: tl.constexpr):
    # y of each row that a thread finishes: sums over the warps, times the token's factor and the row's, plus its bias.
    WIDTH: tl.constexpr = S[0]
    WARPS: tl.constexpr = S[5]
    BY_HAND: tl.constexpr = S[7]
    sums = _over_warps(d, squares, NORMED, WARPS, BY_HAND)
    is_odd, is_lower = warp % 2 == 1, warp // 2 % 2 == 1
    upper = tl.where(is_odd, _for_all(sums[1], WARPS), _for_all(sums[0], WARPS))
    lower = tl.where(is_odd, _for_all(sums[3], WARPS), _for_all(sums[2], WARPS))
    both = (upper, lower) if len(rows) == 2 or WARPS < 4 else (tl.where(is_lower, lower, upper),)
    found = ()
    for k in tl.static_range(len(rows)):
        y = both[k]
        if S[8] == FP8:
            y *= 1152921504606846976.0
        if NORMED:
            square = tl.where(is_odd, _over_quads(sums[5], WARPS), _over_quads(sums[4], WARPS))
            y *= tl.math.rsqrt(square / WIDTH + eps)
        if len(factors) > 0:
            y *= factors[k]
        if len(biases) > 0:
            y += biases[k]
        found = found + (y,)
    return found


@jit
def end_normed(
    d, squares, eps, factors, biases, out, warp, quad, place, num_rows, num_tokens, S: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """Store y, or of gates and what they gate silu(gate) * up, both rounded before."""
    ROWS: tl.constexpr = 8 * S[3]
    dtype = out.dtype.element_ty
    first = _program_again(num_rows, S[7]) * (ROWS // 2 if GATED else ROWS)
    rows = rows_to_finish(first, warp, quad, num_rows, ROWS, S[5], GATED)
    token = 2 * place + warp % 2
    y = _finished(d, squares, eps, factors, biases, rows, warp, True, S)
    if GATED:
        gate, up = y[0].to(dtype).to(tl.float32), y[1].to(dtype).to(tl.float32)
        h = gate * tl.sigmoid(gate) * up
        at = out + token * (num_rows // 2) + rows[0][0]
        tl.store(at, h.to(dtype), mask=rows[0][1] & (token < num_tokens))
    else:
        for k in tl.static_range(len(rows)):
            there = rows[k][1] & (token < num_tokens)
            tl.store(out + token * num_rows + rows[k][0], y[k].to(dtype), mask=there)


@jit
def end_added(
    d, given, warp, quad, place, num_rows, num_tokens, S: tl.constexpr, BIAS: tl.constexpr, RAISED: tl.constexpr
):  # fmt: skip
    """Store the program's part of the new stream, that times the norm's weight, and of its squares their sums.

    What is loaded here takes no registers from the loop, and comes while sums are added up.
    """
    ROWS: tl.constexpr = 8 * S[3]
    WARPS: tl.constexpr = S[5]
    BY_HAND: tl.constexpr = S[7]
    scales, bias, norm, stream, out, new, squares = given
    dtype = out.dtype.element_ty
    token = 2 * place + warp % 2
    rows = rows_to_finish(_program_again(num_rows, BY_HAND) * ROWS, warp, quad, num_rows, ROWS, WARPS, False)
    factors, biases = of_rows(scales, rows, S[8] != FLOAT), of_rows(bias, rows, BIAS)
    norms, olds = of_rows(norm, rows, True), ()
    for k in tl.static_range(len(rows)):
        there = rows[k][1] & (token < num_tokens)
        olds = olds + (tl.load(stream + token * num_rows + rows[k][0], mask=there, other=0.0).to(tl.float32),)
    y = _finished(d, (), 0.0, factors, biases, rows, warp, False, S)
    square = tl.zeros([32 * WARPS], tl.float32)
    for k in tl.static_range(len(rows)):
        there = rows[k][1] & (token < num_tokens)
        at = token * num_rows + rows[k][0]
        value = (olds[k] + y[k].to(dtype).to(tl.float32)).to(dtype)
        tl.store(new + at, value, mask=there)
        wide = value.to(tl.float32)
        x = wide * norms[k].to(dtype).to(tl.float32)
        if RAISED:
            x *= 1152921504606846976.0
        tl.store(out + at, x.to(dtype), mask=there)
        square += tl.where(there, wide * wide, 0.0)
    # [lower, odd, g, t]: of a token over g, then over the warps that have others of its rows.
    total = tl.sum(tl.sum(tl.reshape(square, [WARPS // 2, 2, 8, 4]), axis=2), axis=0)
    of_total = 2 * tl.arange(0, 4)[None, :] + tl.arange(0, 2)[:, None]
    at = squares + of_total * tl.num_programs(1) + tl.program_id(1)
    tl.store(at, total, mask=of_total < num_tokens)

"""The Triton kernel of products of 1 to 64 tokens with a weight in any format, by the tensor cores' own fragments.

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

Weights of 16 bits are operands as they are. A program of 8 rows has them twice in its fragments, and stores them once.

The warps of a program take every so many-th step of columns of the same rows (`COLUMNS`), and are added up at the end,
in one order. A warp has the weights (and int4's scales and zero points) of its next AHEAD steps under way, loaded into
registers of their own, while it multiplies: what a small weight costs is how often the memory's latency is waited for.

OVERLAP: a launch begins while the kernel before it ends (programmatic dependent launch). The first steps' weights are
asked for at once, the input only when that kernel is through. Imported only where Triton is installed.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated, operator, index, misc"
# Tuples grow in Triton's loops, and Triton knows no starred ones.
# ruff: noqa: RUF005

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.chip import chip_of, known_by_chip
from tunesmith.kernels.gemv_fragments_triton import once_asked_for, when_earlier_is_through
from tunesmith.kernels.gemv_steps_triton import byte_step, float_step, int4_step, of_step
from tunesmith.kernels.gemv_triton import FLOAT, FP8, INT4
from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current, num_processors, overlaps
from tunesmith.kernels.quick import quick
from tunesmith.units import ceil_div

# Tokens by format. A program has 16 at most; others with the same rows run beside it and find them in the second cache.
MOST_TOKENS = {0: 16, 1: 32, 2: 32, 3: 64}
# Columns of a step by format (16 bits, int8, fp8, int4): widths are multiples of them.
COLUMNS = {0: 64, 1: 128, 2: 128, 3: 256}
# By format: warps of a processor that run at once, by their registers: with 1 to 8 tokens, with more.
_WARPS_HELD = {0: (24, 16), 1: (28, 16), 2: (28, 16), 3: (16, 8)}
# Registers of a thread with which two programs of 16 warps run at once.
_REGISTERS_OF_TWO = 64
# Values of a weight of 16 bits from which it counts as large.
_LARGE_VALUES = 2**23
_WARPS_WANTED = 12
_STEPS_WANTED = 10
_log = logging.getLogger(__name__)


@jit(do_not_specialize=["num_tokens"])
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
    SCALE_HALF: tl.constexpr,
    ROWS: tl.constexpr,
    TOKEN_TILES: tl.constexpr,
    WARPS: tl.constexpr,
    AHEAD: tl.constexpr,
    BY_HAND: tl.constexpr,
    OVERLAP: tl.constexpr,
    GATED: tl.constexpr,
):
    """out[t, f] = sum of x[t, k] w[f, k] (+ bias[f]); x, w and int4's scales as int32 words, its zero points as int16.

    A program has ROWS (8, 16 or 32) rows of w and 8 TOKEN_TILES tokens. GATED: half of them from the upper half of w,
    the gates, and those that belong to them from the lower: out[t, f] = silu(gate) * up, both rounded as they would be.
    Rows and tokens that are not there are others once more, and are not stored.
    """
    HALF: tl.constexpr = out.dtype.element_ty == tl.float16
    OCTETS: tl.constexpr = ROWS // 8
    TILES: tl.constexpr = (OCTETS + 1) // 2
    S: tl.constexpr = (WIDTH, PER_BLOCK, ZEROS, OCTETS, TOKEN_TILES, WARPS, HALF, BY_HAND, FORMAT, SCALE_HALF)
    STEPS: tl.constexpr = WIDTH // (256 if FORMAT == INT4 else (64 if FORMAT == FLOAT else 128))
    thread = tl.arange(0, 32 * WARPS)
    warp, quad, place = thread // 32, thread % 32 // 4, thread % 4
    zero = tl.zeros([32 * WARPS], tl.float32)
    ones = tl.full([32 * WARPS], 0x3C003C00 if HALF else 0x3F803F80, tl.int32)
    first_token, first = tl.program_id(0) * 8 * TOKEN_TILES, tl.program_id(1) * (ROWS // 2 if GATED else ROWS)
    num_out = num_rows // 2 if GATED else num_rows
    held = ()
    for i in tl.static_range(OCTETS):
        if GATED:
            one = tl.minimum(first + 8 * (i // 2) + quad, num_out - 1) + i % 2 * num_out
        else:
            one = tl.minimum(first + 8 * i + quad, num_rows - 1)
        held = held + (one.to(tl.int64),)
    tokens = ()
    for n in tl.static_range(TOKEN_TILES):
        tokens = tokens + (tl.minimum(first_token + 8 * n + quad, num_tokens - 1) * (WIDTH // 2),)
    acc = ()
    for _i in tl.static_range(TILES * TOKEN_TILES):
        acc = acc + ((zero, zero, zero, zero),)
    ahead = ()
    for j in tl.static_range(AHEAD):
        ahead = ahead + (of_step(w, scales, zeros, held, j * WARPS + warp, place, S),)
    lane = tl.arange(0, 32)[:, None, None]
    lower, odd = tl.arange(0, 2)[None, :, None], tl.arange(0, 2)[None, None, :]
    factors, biases = (), ()
    for i in tl.static_range(TILES):
        if GATED:
            place_out = first + 8 * i + lane // 4
            row, inside = place_out + lower * num_out, (place_out < num_out) & (lower < 2)
        else:
            row = first + 16 * i + 8 * lower + lane // 4
            inside = (row < num_rows) & (row < first + ROWS)
        factor = tl.full([32, 2, 1], 1.0, tl.float32)
        added = tl.zeros([32, 2, 1], tl.float32)
        if FORMAT != INT4 and FORMAT != FLOAT:
            factor = tl.load(scales + row, mask=inside, other=0.0)
        if BIAS:
            added = tl.load(bias + row, mask=inside, other=0.0)
        factors, biases = factors + (factor,), biases + (added,)
    here = once_asked_for(place, BY_HAND)  # of what is loaded above, nothing is used above
    if OVERLAP:
        here = when_earlier_is_through(here)
    for start in range(0, STEPS, WARPS * AHEAD):
        following = ()
        for j in tl.static_range(AHEAD):
            step = start + j * WARPS + warp
            now = ahead[j]
            if STEPS > WARPS * AHEAD:
                # Asked for while this step's are multiplied, and those of AHEAD - 1 steps between.
                now_following = of_step(w, scales, zeros, held, step + WARPS * AHEAD, place, S)
                following = following + (now_following,)
                here = once_asked_for(here, BY_HAND)
            else:
                following = following + (now,)
            wanted = step < STEPS
            if FORMAT == INT4:
                acc = int4_step(acc, now, x, tokens, step, here, zero, ones, S)
            elif FORMAT == FLOAT:
                acc = float_step(acc, now[0], x, tokens, step, wanted, here, S)
            else:
                acc = byte_step(acc, now[0], x, tokens, step, wanted, here, S, FORMAT == FP8)
        ahead = following
    for i in tl.static_range(TILES):
        row = first + 16 * i + 8 * lower + lane // 4
        inside = (row < num_rows) & (row < first + ROWS)
        one_row = first + 8 * i + tl.arange(0, 32)[:, None] // 4
        for n in tl.static_range(TOKEN_TILES):
            d = acc[i * TOKEN_TILES + n]
            # [lane, lower, odd] of every warp, added up over the warps in one go.
            d = tl.join(tl.join(d[0], d[2]), tl.join(d[1], d[3]))
            y = tl.sum(tl.reshape(d, [WARPS, 32, 2, 2]), axis=0)
            if FORMAT == FP8:
                y *= 256.0 if HALF else 1152921504606846976.0
            y = y * factors[i] + biases[i].to(tl.float32)
            if GATED:
                gate, up = tl.split(tl.permute(y.to(out.dtype.element_ty).to(tl.float32), (0, 2, 1)))
                token = first_token + 8 * n + tl.arange(0, 32)[:, None] % 4 * 2 + tl.arange(0, 2)[None, :]
                h = gate * tl.sigmoid(gate) * up
                there = (one_row < num_out) & (token < num_tokens)
                tl.store(out + token * num_out + one_row, h.to(out.dtype.element_ty), mask=there)
            else:
                token = first_token + 8 * n + lane % 4 * 2 + odd
                tl.store(out + token * num_rows + row, y.to(out.dtype.element_ty), mask=inside & (token < num_tokens))


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
    return _has_fragments(x_TD.device)


@known_by_chip
def _has_fragments(device: torch.device) -> bool:
    """Fragments of this size in both dtypes: from compute capability 8.0 on, and in Triton's interpreter."""
    chip = chip_of(device)
    return chip is None or chip.capability >= (8, 0)


Shape = tuple[int, int, int]
"""Of a program: rows of the weight, warps, and the steps that each warp has under way."""


@cache
def shape_of(format_id: int, num_rows: int, width: int, processors: int, num_tokens: int = 1) -> Shape:
    """A program's shape for a weight and a number of tokens.

    16 rows; 32 where more than 8 tokens of int4 are to share what is unpacked; of 16 bits 8 where there would be fewer
    programs than processors. Warps, a power of two: until every processor has `_WARPS_WANTED`, and none has more than
    `_STEPS_WANTED` steps one after the other, but no more than run at once (`_WARPS_HELD`): a rest of programs that
    waits for the others to end costs as much as they did.
    """
    is_many = num_tokens > 8
    if format_id == 0 and num_tokens <= 8 and num_rows * width > _LARGE_VALUES:
        return _shape_of_large(num_rows, width, processors)
    rows = 32 if is_many and format_id == 3 else 16
    if format_id == 0 and num_rows <= 8 * processors:
        rows = 8
    programs = ceil_div(num_rows, rows) * ceil_div(num_tokens, 16)
    steps, held = width // COLUMNS[format_id], _WARPS_HELD[format_id][is_many] * processors
    warps = 2
    while warps < 16 and 2 * warps <= max(2, steps):
        wanted = programs * warps < _WARPS_WANTED * processors or steps > _STEPS_WANTED * warps
        runs_at_once = programs * 2 * warps <= held or programs > held // 2
        if not (wanted and runs_at_once):
            break
        warps *= 2
    return rows, warps, 2 if format_id == 0 else 1


def _shape_of_large(num_rows: int, width: int, processors: int) -> Shape:
    """Of a large weight of 16 bits: as many warps, from 4 to 16, as run at once, each with one step under way."""
    programs = ceil_div(num_rows, 16)
    # Of 16 warps, whose registers are limited for it, two programs run at once.
    warps = 16 if 16 * programs <= 32 * processors else 8 if 8 * programs <= 24 * processors else 4
    most = 1 << max(1, (width // COLUMNS[0]).bit_length() - 1)
    return 16, min(warps, most), 1


def quads(
    format_id: int,
    x_TD: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bias_F: Tensor | None,
    out_TF: Tensor,
    *,
    per_block: int = 1,
    shape: Shape | None = None,
    is_gated: bool = False,
) -> bool:
    """Launch the kernel: a few tokens' product into `out_TF`, of what `takes_quads`. x contiguous.

    shape: a program's (None: by `shape_of`). is_gated: of gates above what they gate, silu(gate) * up [T, F / 2].
    Returns: whether the result is right. Not where a version of Triton moves the loop's values between threads.
    """
    num_tokens, num_rows = x_TD.shape[0], weight.shape[0]
    width = x_TD.shape[1]
    rows, warps, ahead = shape or shape_of(format_id, num_rows, width, num_processors(x_TD.device), num_tokens)
    rows = max(16, rows) if is_gated else rows
    token_tiles = 1 if num_tokens <= 8 else 2
    is_int4 = format_id == 3
    options: dict[str, object] = {"launch_pdl": True} if overlaps(x_TD.device) else {}
    if warps == 16 and ahead * rows <= 16 and token_tiles == 1 and x_TD.device.type != "cpu":
        options["maxnreg"] = _REGISTERS_OF_TWO  # a few more, and only one program ran at once
    with current(x_TD.device):
        compiled = quick(quad_kernel)[(ceil_div(num_tokens, 8 * token_tiles), ceil_div(num_rows, rows))](
            x_TD.view(torch.int32),
            weight.view(torch.int32),
            out_TF if scales is None else scales.view(torch.int32) if is_int4 else scales,
            out_TF if zeros is None else zeros.view(torch.int16),
            out_TF if bias_F is None else bias_F,
            out_TF,
            num_rows,
            num_tokens,
            WIDTH=width,
            FORMAT=format_id,
            PER_BLOCK=per_block,
            ZEROS=zeros is not None,
            BIAS=bias_F is not None,
            SCALE_HALF=is_int4 and scales is not None and scales.dtype == torch.float16,
            ROWS=rows,
            TOKEN_TILES=token_tiles,
            WARPS=warps,
            AHEAD=ahead,
            BY_HAND=x_TD.device.type != "cpu",  # Triton's interpreter has no assembler
            OVERLAP="launch_pdl" in options,
            GATED=is_gated,
            num_warps=warps,
            num_stages=1,
            enable_fp_fusion=True,
            **options,
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

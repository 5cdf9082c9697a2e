"""The parts of a context in decoding: which there are, and the Triton kernel that joins what they found.

Imported only where Triton is installed. See tunesmith.kernels.paged_attention_triton.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton.language as tl

from tunesmith.kernels.jit import jit
from tunesmith.kernels.overlap_triton import let_next_begin, when_known_and_through


@jit
def join_parts(mixed, largest, total, part_mixed, part_largest, part_total):
    # Two parts of the context as one. A part in which a row sees nothing has the largest score -inf and adds nothing.
    joined = tl.maximum(largest, part_largest)
    shift = tl.where(joined == float("-inf"), 0.0, joined)
    old, new = tl.exp2(largest - shift), tl.exp2(part_largest - shift)
    mixed = mixed * tl.expand_dims(old, -1) + part_mixed * tl.expand_dims(new, -1)
    return mixed, joined, total * old + part_total * new


@jit
def extent_of(
    context, count, first_row, last_row, window, GROUP: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr
):
    # The positions that a tile of rows sees: from the first, at the start of a tile of keys, to behind the last.
    before = context - count
    end = before + last_row // GROUP + 1
    begin = 0
    if WINDOW:
        begin = tl.maximum(before + first_row // GROUP - window + 1, 0) // KEYS * KEYS
    return begin, end


@jit
def parts_of(begin, end, most_parts, FIXED: tl.constexpr, LEAST: tl.constexpr, KEYS: tl.constexpr):
    # Where the first part begins, how long a part is, and how many there are.
    if FIXED > 0:
        base = begin // FIXED * FIXED
        size = FIXED
    else:
        base = begin
        size = (tl.cdiv(end - base, most_parts) + KEYS - 1) // KEYS * KEYS
        size = tl.maximum(size, LEAST)
    return base, size, tl.cdiv(end - base, size)


@jit
def join_found(
    found,
    statistics,
    base,
    most_parts,
    num_parts,
    num_rows,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    # The values [ROWS, COLUMNS] of all parts of a request's rows, which other programs have found.
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mixed = tl.zeros([ROWS, COLUMNS], tl.float32)
    largest, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    for first in range(0, num_parts, AT_ONCE):
        some = first + tl.arange(0, AT_ONCE)
        mask = (some < num_parts)[:, None] & (row < num_rows)[None, :]
        place = (base + row)[None, :] * most_parts + some[:, None]
        of_some = tl.load(statistics + place * 2, mask=mask, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(statistics + place * 2 + 1, mask=mask, other=0.0, cache_modifier=".cg")
        at = place[:, :, None] * COLUMNS + column[None, None, :]
        values = tl.load(found + at, mask=mask[:, :, None], other=0.0, cache_modifier=".cg")
        largest_of_some = tl.max(of_some, axis=0)
        shift = tl.where(largest_of_some == float("-inf"), 0.0, largest_of_some)
        weight = tl.exp2(of_some - shift[None, :])
        values = tl.sum(values * weight[:, :, None], axis=0)
        totals = tl.sum(totals * weight, axis=0)
        mixed, largest, total = join_parts(mixed, largest, total, values, largest_of_some, totals)
    return mixed / total[:, None]


@jit(do_not_specialize=["most_parts", "held_rows"])
def join_kernel(
    found,
    statistics,
    starts,
    contexts,
    out,
    window,
    out_token_stride,
    out_head_stride,
    most_parts,
    held_rows,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    FIXED: tl.constexpr,
    LEAST: tl.constexpr,
    WINDOW: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    # A program for one row of a request: what its parts found becomes its output.
    row, head, request = tl.program_id(1), tl.program_id(0) % NUM_HEADS, tl.program_id(0) // NUM_HEADS
    if OVERLAP:
        head = let_next_begin(head)
    start = tl.load(starts + request)
    count = tl.load(starts + request + 1) - start
    num_rows = count * GROUP
    if OVERLAP:
        begin, end = extent_of(tl.load(contexts + request), count, 0, num_rows - 1, window, GROUP, KEYS, WINDOW)
        _, _, num_parts = parts_of(begin, end, most_parts, FIXED, LEAST, KEYS)
        head = when_known_and_through(head, num_parts)
    if (num_rows > ROWS) | (row >= num_rows):
        return
    if not OVERLAP:
        begin, end = extent_of(tl.load(contexts + request), count, 0, num_rows - 1, window, GROUP, KEYS, WINDOW)
        _, _, num_parts = parts_of(begin, end, most_parts, FIXED, LEAST, KEYS)
    if num_parts == 1:
        return
    column = tl.arange(0, COLUMNS)[None, :]
    held = ((request * NUM_HEADS + head).to(tl.int64) * held_rows + row) * most_parts
    # One after the other where the order of the sums must not depend on how many there may be: AT_ONCE is 1 then.
    mixed = tl.zeros([1, COLUMNS], tl.float32)
    largest, total = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    for first in range(0, num_parts, AT_ONCE):
        some = first + tl.arange(0, AT_ONCE)
        is_part = some < num_parts
        place = held + some
        of_some = tl.load(statistics + place * 2, mask=is_part, other=float("-inf"))
        totals = tl.load(statistics + place * 2 + 1, mask=is_part, other=0.0)
        values = tl.load(found + place[:, None] * COLUMNS + column, mask=is_part[:, None], other=0.0)
        if AT_ONCE > 1:
            largest_of_some = tl.max(of_some, axis=0, keep_dims=True)
            shift = tl.where(largest_of_some == float("-inf"), 0.0, largest_of_some)
            weight = tl.exp2(of_some - shift)
            values = tl.sum(values * weight[:, None], axis=0, keep_dims=True)
            totals = tl.sum(totals * weight, axis=0, keep_dims=True)
            of_some = largest_of_some
        mixed, largest, total = join_parts(mixed, largest, total, values, of_some, totals)
    place = (start + row // GROUP).to(tl.int64) * out_token_stride + (head * GROUP + row % GROUP) * out_head_stride
    tl.store(out + place + column, (mixed / total[:, None]).to(out.dtype.element_ty), mask=column < WIDTH)

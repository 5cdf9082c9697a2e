"""The Triton kernels of paged attention. Imported only where Triton is installed.

Query heads that share a key head are rows of one tile, beside the new tokens of a request:

    row m of a request  =  query head  head * GROUP + m % GROUP  of its new token  m // GROUP

One kernel serves both kinds of request. In decoding a program has all rows of a request, and one part of its context:

    base           base + size     base + 2 size     end
    |--- part 0 ---|--- part 1 ---|--- part 2 ------|        size: FIXED, or what makes at most PARTS parts

and what the parts found (their largest score, the sum, the values mixed) is joined by the program that comes last, or
by a second kernel. In prefill a
program has a tile of rows and goes over the context alone. Scores are in units of log2.
Source: softmax by tiles, arXiv 2205.14135, section 3.1; parts of a context, arXiv 2311.01282, section 3.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton.language as tl

from tunesmith.kernels.jit import jit
from tunesmith.kernels.overlap_triton import let_next_begin, when_known_and_through
from tunesmith.kernels.paged_attention_parts_triton import extent_of, join_found, join_parts, parts_of

REQUESTS_AT_ONCE = tl.constexpr(128)


@jit
def _go_over(
    mixed,
    largest,
    total,
    query,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    head,
    seen,
    begin,
    end,
    scale,
    window,
    NUM_HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    FP8: tl.constexpr,
):
    # The positions begin ... end - 1, KEYS at a time. Without MASKED every row sees all of them.
    column = tl.arange(0, COLUMNS)[None, :]
    for first in tl.range(begin, end, KEYS):
        position = first + tl.arange(0, KEYS)
        if MASKED:
            page = tl.load(table + position // SLOTS, mask=position < end, other=0)
        else:
            page = tl.load(table + position // SLOTS)
        slot = page.to(tl.int64) * SLOTS + position % SLOTS
        place = (slot * NUM_HEADS + head)[:, None] * WIDTH + column
        if MASKED:
            mask = (position < end)[:, None] & (column < WIDTH)
            key = tl.load(keys + place, mask=mask, other=0.0)
        elif WIDTH != COLUMNS:
            key = tl.load(keys + place, mask=column < WIDTH, other=0.0)
        else:
            key = tl.load(keys + place)
        score = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision="ieee") * scale
        if FP8:
            score *= tl.load(key_scales + page.to(tl.int64) * NUM_HEADS + head)[None, :]
        if MASKED:
            visible = position[None, :] <= seen[:, None]
            if WINDOW:
                visible &= position[None, :] > seen[:, None] - window
            score = tl.where(visible, score, float("-inf"))
        larger = tl.maximum(largest, tl.max(score, axis=1))
        shift = tl.where(larger == float("-inf"), 0.0, larger) if MASKED else larger
        weight = tl.exp2(score - shift[:, None])
        old = tl.exp2(largest - shift)
        total = total * old + tl.sum(weight, axis=1)
        largest = larger
        if FP8:
            weight *= tl.load(value_scales + page.to(tl.int64) * NUM_HEADS + head)[None, :]
        if MASKED:
            value = tl.load(values + place, mask=mask, other=0.0)
        elif WIDTH != COLUMNS:
            value = tl.load(values + place, mask=column < WIDTH, other=0.0)
        else:
            value = tl.load(values + place)
        if FP8:
            # The codes' scales make weights smaller than half precision can hold.
            value = value.to(tl.float32) if query.dtype == tl.float32 else value.to(tl.bfloat16)
        mixed = tl.dot(weight.to(value.dtype), value, mixed * old[:, None], input_precision="ieee")
    return mixed, largest, total


@jit
def _part_of(
    query,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    head,
    seen,
    from_here,
    to_here,
    common,
    scale,
    window,
    NUM_HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    FP8: tl.constexpr,
    PHASES: tl.constexpr,
):
    # What a part of the context gives: with two phases, first without masks the positions below `common`.
    mixed = tl.zeros([ROWS, COLUMNS], tl.float32)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    masked_from = from_here
    if PHASES == 2:
        masked_from = tl.maximum(tl.minimum(common, to_here // KEYS * KEYS), from_here)
        mixed, largest, total = _go_over(
            mixed,
            largest,
            total,
            query,
            keys,
            values,
            key_scales,
            value_scales,
            table,
            head,
            seen,
            from_here,
            masked_from,
            scale,
            window,
            NUM_HEADS,
            SLOTS,
            WIDTH,
            COLUMNS,
            KEYS,
            False,
            False,
            FP8,
        )
    return _go_over(
        mixed,
        largest,
        total,
        query,
        keys,
        values,
        key_scales,
        value_scales,
        table,
        head,
        seen,
        masked_from,
        to_here,
        scale,
        window,
        NUM_HEADS,
        SLOTS,
        WIDTH,
        COLUMNS,
        KEYS,
        True,
        WINDOW,
        FP8,
    )


@jit(do_not_specialize=["num_requests", "table_stride", "most_parts", "held_rows"])
def attend_kernel(
    query,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    starts,
    contexts,
    out,
    found,
    statistics,
    arrivals,
    num_requests,
    scale,
    window,
    table_stride,
    token_stride,
    head_stride,
    out_token_stride,
    out_head_stride,
    most_parts,
    held_rows,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DECODE: tl.constexpr,
    SMALL: tl.constexpr,
    SPLIT: tl.constexpr,
    JOIN_ROWS: tl.constexpr,
    JOIN_AT_ONCE: tl.constexpr,
    FIXED: tl.constexpr,
    LEAST: tl.constexpr,
    WINDOW: tl.constexpr,
    FP8: tl.constexpr,
    PHASES: tl.constexpr,
    OVERLAP: tl.constexpr,
) -> None:
    # DECODE: a program for each request with at most ROWS rows, key head and part. Else for each tile of rows of the
    # requests with more than SMALL rows, and key head: request r has its tiles from starts[r] * GROUP // ROWS + r on.
    # OVERLAP: lengths and tables are there since before the pass's last ordinary launch (`launch.overlapped`).
    if DECODE:
        # Requests lie in the first dimension of the grid: the others end at 65,535.
        head, request, part = tl.program_id(0) % NUM_HEADS, tl.program_id(0) // NUM_HEADS, tl.program_id(1)
        first_row = 0
    else:
        tile, head, part = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), 0
        request = -1
        for first in range(0, num_requests, REQUESTS_AT_ONCE):
            each = first + tl.arange(0, REQUESTS_AT_ONCE)
            start_of_each = tl.load(starts + each, mask=each < num_requests, other=0)
            is_behind = (start_of_each * GROUP // ROWS + each <= tile) & (each < num_requests)
            request += tl.sum(is_behind.to(tl.int32), axis=0)
    if OVERLAP:
        head = let_next_begin(head)
    start = tl.load(starts + request)
    count = tl.load(starts + request + 1) - start
    context = tl.load(contexts + request)
    num_rows = count * GROUP
    if OVERLAP:
        number = num_rows
        if DECODE:
            # The same numbers as below, worked out once.
            last_row = tl.minimum(first_row + ROWS, num_rows) - 1
            begin, end = extent_of(context, count, first_row, last_row, window, GROUP, KEYS, WINDOW)
            _, _, number = parts_of(begin, end, most_parts, FIXED, LEAST, KEYS)
        head = when_known_and_through(head, number)
    if DECODE:
        if (num_rows > ROWS) | (num_rows == 0):
            return
    else:
        first_row = (tile - start * GROUP // ROWS - request) * ROWS
        if (first_row >= num_rows) | (num_rows <= SMALL):
            return
    last_row = tl.minimum(first_row + ROWS, num_rows) - 1
    begin, end = extent_of(context, count, first_row, last_row, window, GROUP, KEYS, WINDOW)
    base, size, num_parts = parts_of(begin, end, most_parts, FIXED, LEAST, KEYS)
    if part >= num_parts:
        return

    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    is_row = row < num_rows
    mask = is_row[:, None] & (column < WIDTH)[None, :]
    token = (start + row // GROUP).to(tl.int64)
    query_head = head * GROUP + row % GROUP
    place = token * token_stride + query_head * head_stride
    query_tile = tl.load(query + place[:, None] + column[None, :], mask=mask, other=0.0)
    seen = context - count + tl.minimum(row, last_row) // GROUP
    table = tables + request.to(tl.int64) * table_stride
    # Up to here all rows see everything.
    common = (context - count + first_row // GROUP + 1) // KEYS * KEYS
    if WINDOW:
        common = 0

    if (not SPLIT) & (FIXED > 0):
        # Part after part, joined in the order and by the sums of the second kernel.
        mixed = tl.zeros([ROWS, COLUMNS], tl.float32)
        largest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for index in range(num_parts):
            from_here, to_here = tl.maximum(base + index * size, begin), tl.minimum(base + (index + 1) * size, end)
            part_mixed, part_largest, part_total = _part_of(
                query_tile,
                keys,
                values,
                key_scales,
                value_scales,
                table,
                head,
                seen,
                from_here,
                to_here,
                common,
                scale,
                window,
                NUM_HEADS,
                SLOTS,
                WIDTH,
                ROWS,
                COLUMNS,
                KEYS,
                WINDOW,
                FP8,
                PHASES,
            )
            mixed, largest, total = join_parts(mixed, largest, total, part_mixed, part_largest, part_total)
    else:
        from_here, to_here = tl.maximum(base + part * size, begin), tl.minimum(base + (part + 1) * size, end)
        mixed, largest, total = _part_of(
            query_tile,
            keys,
            values,
            key_scales,
            value_scales,
            table,
            head,
            seen,
            from_here,
            to_here,
            common,
            scale,
            window,
            NUM_HEADS,
            SLOTS,
            WIDTH,
            ROWS,
            COLUMNS,
            KEYS,
            WINDOW,
            FP8,
            PHASES,
        )
    place = (token * out_token_stride + query_head * out_head_stride)[:, None] + column[None, :]
    if SPLIT:
        if num_parts > 1:
            held = ((request * NUM_HEADS + head).to(tl.int64) * held_rows + row) * most_parts + part
            tl.store(found + held[:, None] * COLUMNS + column[None, :], mixed, mask=is_row[:, None])
            tl.store(statistics + held * 2, largest, mask=is_row)
            tl.store(statistics + held * 2 + 1, total, mask=is_row)
            if JOIN_ROWS > 0:
                # What all threads have written is seen by the program that counts last; it counts from none again.
                tl.debug_barrier()
                counter = arrivals + request * NUM_HEADS + head
                if tl.atomic_add(counter, 1, sem="acq_rel") == num_parts - 1:
                    tl.store(counter, 0)
                    first_held = (request * NUM_HEADS + head).to(tl.int64) * held_rows
                    joined = join_found(
                        found,
                        statistics,
                        first_held,
                        most_parts,
                        num_parts,
                        num_rows,
                        JOIN_ROWS,
                        COLUMNS,
                        JOIN_AT_ONCE,
                    )
                    joined_row = tl.arange(0, JOIN_ROWS)
                    into = (start + joined_row // GROUP).to(tl.int64) * out_token_stride
                    into += (head * GROUP + joined_row % GROUP) * out_head_stride
                    written = (joined_row < num_rows)[:, None] & (column < WIDTH)[None, :]
                    tl.store(out + into[:, None] + column[None, :], joined.to(out.dtype.element_ty), mask=written)
        else:
            tl.store(out + place, (mixed / total[:, None]).to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(out + place, (mixed / total[:, None]).to(out.dtype.element_ty), mask=mask)

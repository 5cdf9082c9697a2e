"""The Triton kernel that loads the inputs of a step with prompts, as a torch custom operator."""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current
from tunesmith.kernels.quick import quick
from tunesmith.units import ceil_div

_TOKENS, _COLUMNS = 64, 256


@torch.library.custom_op(
    "tunesmith::load_prompt_inputs",
    mutates_args=("to_tokens", "to_positions", "to_slots", "to_starts", "to_contexts", "to_tables"),
)
def load_prompt_inputs_operator(
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    starts: Tensor,
    contexts: Tensor,
    tables: Tensor,
    to_tokens: Tensor,
    to_positions: Tensor,
    to_slots: Tensor,
    to_starts: Tensor,
    to_contexts: Tensor,
    to_tables: Tensor,
    last_tokens: Tensor,
    slots_of_page: int,
) -> None:
    """See tunesmith.kernels.prompt_inputs.load_prompt_inputs; all but the tables are contiguous."""
    most_tokens, most_requests = to_tokens.shape[0], to_contexts.shape[0]
    with current(to_tokens.device):
        quick(_load_kernel)[(max(ceil_div(most_tokens, _TOKENS), most_requests),)](
            tokens,
            positions,
            slots,
            starts,
            contexts,
            tables,
            to_tokens,
            to_positions,
            to_slots,
            to_starts,
            to_contexts,
            to_tables,
            last_tokens,
            tokens.shape[0],
            contexts.shape[0],
            most_tokens,
            most_requests,
            tables.stride(0),
            to_tables.stride(0),
            PAGE=slots_of_page,
            TOKENS=_TOKENS,
            COLUMNS=_COLUMNS,
            num_warps=2,
            enable_fp_fusion=True,
        )


@load_prompt_inputs_operator.register_fake
def _load_prompt_inputs_fake(
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    starts: Tensor,
    contexts: Tensor,
    tables: Tensor,
    to_tokens: Tensor,
    to_positions: Tensor,
    to_slots: Tensor,
    to_starts: Tensor,
    to_contexts: Tensor,
    to_tables: Tensor,
    last_tokens: Tensor,
    slots_of_page: int,
) -> None:
    return None


@jit(
    do_not_specialize=["num_tokens", "num_requests", "most_tokens", "most_requests", "table_stride", "to_table_stride"]
)
def _load_kernel(
    tokens,
    positions,
    slots,
    starts,
    contexts,
    tables,
    to_tokens,
    to_positions,
    to_slots,
    to_starts,
    to_contexts,
    to_tables,
    last_tokens,
    num_tokens,
    num_requests,
    most_tokens,
    most_requests,
    table_stride,
    to_table_stride,
    PAGE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Some tokens of the target, and one of its requests: those of the step, or padding."""
    place = tl.program_id(0)
    row = place * TOKENS + tl.arange(0, TOKENS)
    is_row, is_real = row < most_tokens, row < num_tokens
    token = tl.load(tokens + row, mask=is_real, other=0)
    is_drawn = token < 0
    last = tl.load(last_tokens + tl.where(is_drawn, -1 - token, 0), mask=is_drawn, other=0)
    tl.store(to_tokens + row, tl.where(is_drawn, last, token), mask=is_row)
    tl.store(to_positions + row, tl.load(positions + row, mask=is_real, other=0), mask=is_row)
    tl.store(to_slots + row, tl.load(slots + row, mask=is_real, other=-1), mask=is_row)
    if place < most_requests:
        # The first start is zero, and stays it.
        tl.store(to_starts + place + 1, tl.load(starts + tl.minimum(place + 1, num_requests)))
        if place < num_requests:
            context = tl.load(contexts + place)
            tl.store(to_contexts + place, context)
            pages = (context + PAGE - 1) // PAGE
            source, target = tables + place * table_stride, to_tables + place * to_table_stride
            for start in range(0, pages, COLUMNS):
                column = start + tl.arange(0, COLUMNS)
                page = tl.load(source + column, mask=column < pages)
                tl.store(target + column, page, mask=column < pages)
        else:
            tl.store(to_contexts + place, 1)

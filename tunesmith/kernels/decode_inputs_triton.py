"""The Triton kernel that loads a decoding step's inputs, as a torch custom operator."""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current
from tunesmith.kernels.quick import quick

_COLUMNS = 256


@torch.library.custom_op(
    "tunesmith::load_decode_inputs",
    mutates_args=(
        "to_tokens",
        "to_positions",
        "to_slots",
        "to_sample_slots",
        "to_sample_positions",
        "to_contexts",
        "to_adapters",
        "to_tables",
    ),
)
def load_inputs_operator(
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    sample_slots: Tensor,
    sample_positions: Tensor,
    contexts: Tensor,
    adapters: Tensor,
    tables: Tensor,
    to_tokens: Tensor,
    to_positions: Tensor,
    to_slots: Tensor,
    to_sample_slots: Tensor,
    to_sample_positions: Tensor,
    to_contexts: Tensor,
    to_adapters: Tensor,
    to_tables: Tensor,
    last_tokens: Tensor,
    slots_of_page: int,
) -> None:
    """See tunesmith.kernels.decode_inputs.load_inputs; all but the tables are contiguous."""
    with current(to_tokens.device):
        quick(_load_kernel)[(to_tokens.shape[0],)](
            tokens,
            positions,
            slots,
            sample_slots,
            sample_positions,
            contexts,
            adapters,
            tables,
            to_tokens,
            to_positions,
            to_slots,
            to_sample_slots,
            to_sample_positions,
            to_contexts,
            to_adapters,
            to_tables,
            last_tokens,
            tokens.shape[0],
            last_tokens.shape[0] - 1,
            tables.stride(0),
            to_tables.stride(0),
            PAGE=slots_of_page,
            COLUMNS=_COLUMNS,
            num_warps=2,
            enable_fp_fusion=True,
        )


@load_inputs_operator.register_fake
def _load_inputs_fake(
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    sample_slots: Tensor,
    sample_positions: Tensor,
    contexts: Tensor,
    adapters: Tensor,
    tables: Tensor,
    to_tokens: Tensor,
    to_positions: Tensor,
    to_slots: Tensor,
    to_sample_slots: Tensor,
    to_sample_positions: Tensor,
    to_contexts: Tensor,
    to_adapters: Tensor,
    to_tables: Tensor,
    last_tokens: Tensor,
    slots_of_page: int,
) -> None:
    return None


@jit(do_not_specialize=["num_rows", "padding_slot", "table_stride", "to_table_stride"])
def _load_kernel(
    tokens,
    positions,
    slots,
    sample_slots,
    sample_positions,
    contexts,
    adapters,
    tables,
    to_tokens,
    to_positions,
    to_slots,
    to_sample_slots,
    to_sample_positions,
    to_contexts,
    to_adapters,
    to_tables,
    last_tokens,
    num_rows,
    padding_slot,
    table_stride,
    to_table_stride,
    PAGE: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One row of the target: a row of the step, or one of padding."""
    row = tl.program_id(0)
    if row < num_rows:
        token = tl.load(tokens + row)
        if token < 0:
            token = tl.load(last_tokens + (-1 - token))
        tl.store(to_tokens + row, token)
        tl.store(to_positions + row, tl.load(positions + row))
        tl.store(to_slots + row, tl.load(slots + row))
        tl.store(to_sample_slots + row, tl.load(sample_slots + row))
        tl.store(to_sample_positions + row, tl.load(sample_positions + row))
        tl.store(to_adapters + row, tl.load(adapters + row))
        context = tl.load(contexts + row)
        tl.store(to_contexts + row, context)
        pages = (context + PAGE - 1) // PAGE
        source, target = tables + row * table_stride, to_tables + row * to_table_stride
        for start in range(0, pages, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            page = tl.load(source + column, mask=column < pages)
            tl.store(target + column, page, mask=column < pages)
    else:
        tl.store(to_tokens + row, 0)
        tl.store(to_positions + row, 0)
        tl.store(to_slots + row, -1)
        tl.store(to_sample_slots + row, padding_slot)
        tl.store(to_sample_positions + row, 1)
        tl.store(to_adapters + row, -1)
        tl.store(to_contexts + row, 1)
        tl.store(to_tables + row * to_table_stride, 0)

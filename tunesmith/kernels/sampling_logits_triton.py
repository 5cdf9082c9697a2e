"""The Triton kernel of penalties and masks, as a torch custom operator. Imported only where Triton is installed."""

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

_COLUMNS = 2048


@torch.library.custom_op("tunesmith::change_logits", mutates_args=())
def change_operator(
    logits: Tensor,
    slots: Tensor,
    prompts: Tensor,
    answers: Tensor,
    places: Tensor,
    penalties: Tensor,
    masks: Tensor | None,
    mask_rows: Tensor | None,
) -> Tensor:
    """See tunesmith.kernels.sampling_logits.change_logits; prompts are uint8, all but the logits contiguous."""
    num_rows, vocab_size = logits.shape
    changed = torch.empty(num_rows, vocab_size, dtype=torch.float32, device=logits.device)
    if not num_rows:
        return changed
    with current(logits.device):
        quick(change_kernel)[(num_rows, ceil_div(vocab_size, _COLUMNS))](
            logits,
            slots,
            prompts,
            answers,
            places,
            penalties,
            slots if masks is None else masks,
            slots if mask_rows is None else mask_rows,
            changed,
            logits.stride(0),
            vocab_size,
            0 if masks is None else masks.shape[1],
            penalties.stride(0),
            HAS_MASKS=masks is not None,
            COLUMNS=_COLUMNS,
            num_warps=8,
            enable_fp_fusion=False,  # rounds as plain torch does
        )
    return changed


@change_operator.register_fake
def _change_fake(
    logits: Tensor,
    slots: Tensor,
    prompts: Tensor,
    answers: Tensor,
    places: Tensor,
    penalties: Tensor,
    masks: Tensor | None,
    mask_rows: Tensor | None,
) -> Tensor:
    return logits.new_empty(logits.shape, dtype=torch.float32)


@jit(do_not_specialize=["words", "penalty_stride"])
def change_kernel(
    logits,
    slots,
    prompts,
    answers,
    places,
    penalties,
    masks,
    mask_rows,
    changed,
    stride,
    vocab_size,
    words,
    penalty_stride,
    HAS_MASKS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = at < vocab_size
    value = tl.load(logits + row.to(tl.int64) * stride + at, mask=mask, other=0.0).to(tl.float32)
    place = tl.load(places + row)
    if place >= 0:
        slot = tl.load(slots + row)
        presence = tl.load(penalties + slot)
        frequency = tl.load(penalties + penalty_stride + slot)
        repetition = tl.load(penalties + 2 * penalty_stride + slot)
        count = tl.load(answers + place * vocab_size + at, mask=mask, other=0).to(tl.float32)
        in_prompt = tl.load(prompts + place * vocab_size + at, mask=mask, other=0) != 0
        factor = tl.where(in_prompt | (count > 0), repetition, 1.0)
        value = tl.where(value > 0, tl.div_rn(value, factor), value * factor)
        value = value - frequency * count - tl.where(count > 0, presence, 0.0)
    if HAS_MASKS:
        masked = tl.load(mask_rows + row)
        if masked >= 0:
            word = tl.load(masks + masked * words + at // 32, mask=mask, other=0)
            value = tl.where(((word >> (at % 32)) & 1) != 0, value, float("-inf"))
    tl.store(changed + row.to(tl.int64) * vocab_size + at, value, mask=mask)

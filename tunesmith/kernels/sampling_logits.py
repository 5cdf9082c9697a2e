"""Logits as they are drawn from: penalties of tokens that were seen, and the tokens that a grammar allows.

Repetition: divided by the penalty, or multiplied where negative, if the token is in prompt or answer. Then minus
frequency x the times that it is in the answer, minus presence if it is there at all. What a mask does not allow is
minus infinity.
Source: arXiv 1909.05858, section 4.1 (repetition); OpenAI's API reference (frequency and presence).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.kernels.nf4 import use_kernel


@dataclass(frozen=True)
class Seen:
    """What was seen. prompts_NV: bool, answers_NV: int16, how often, by place. places_B: int64, each row's; -1: none.

    penalties_3N: float32 by slot: presence, frequency, repetition.
    """

    prompts_NV: Tensor
    answers_NV: Tensor
    places_B: Tensor
    penalties_3N: Tensor


@dataclass(frozen=True)
class Allowed:
    """masks_MW: int32, bit t % 32 of word t // 32 set where token t is allowed. mask_rows_B: int64; -1: no mask."""

    masks_MW: Tensor
    mask_rows_B: Tensor


def change_logits(logits_BV: Tensor, slots_B: Tensor, seen: Seen, allowed: Allowed | None) -> Tensor:
    """A float32 copy of the logits, penalised and masked row by row. Nothing waits for the device.

    Args: logits_BV: any float dtype, last stride 1. slots_B: int64.
    """
    if not use_kernel(logits_BV.device):
        return change_logits_reference(logits_BV, slots_B, seen, allowed)
    from tunesmith.kernels.sampling_logits_triton import change_operator

    masks, mask_rows = (None, None) if allowed is None else (allowed.masks_MW, allowed.mask_rows_B)
    prompts = seen.prompts_NV.view(torch.uint8)
    return change_operator(
        logits_BV, slots_B, prompts, seen.answers_NV, seen.places_B, seen.penalties_3N, masks, mask_rows
    )


def change_logits_reference(logits_BV: Tensor, slots_B: Tensor, seen: Seen, allowed: Allowed | None) -> Tensor:
    """`change_logits` by plain torch: the truth that the kernel must equal."""
    logits = logits_BV.to(torch.float32, copy=True)
    if seen.prompts_NV.shape[0]:
        has_place = seen.places_B[:, None] >= 0
        places = seen.places_B.clamp(min=0)
        in_prompt = seen.prompts_NV.index_select(0, places) & has_place
        in_answer = seen.answers_NV.index_select(0, places) * has_place
        penalties = seen.penalties_3N.index_select(1, slots_B)
        logits = torch.where(has_place, penalise(logits, in_prompt, in_answer, *penalties), logits)
    if allowed is not None and allowed.masks_MW.shape[0]:
        may = unpack_masks(allowed.masks_MW, logits.shape[1]).index_select(0, allowed.mask_rows_B.clamp(min=0))
        logits = logits.masked_fill(~(may | (allowed.mask_rows_B < 0)[:, None]), -math.inf)
    return logits


def penalise(
    logits_MV: Tensor,
    in_prompt_MV: Tensor,
    in_answer_MV: Tensor,
    presence_M: Tensor,
    frequency_M: Tensor,
    repetition_M: Tensor,
) -> Tensor:
    """Logits of tokens already seen, lowered."""
    answered = in_answer_MV > 0
    repetition = torch.where(in_prompt_MV | answered, repetition_M[:, None], 1.0)
    logits = torch.where(logits_MV > 0, logits_MV / repetition, logits_MV * repetition)
    return logits - frequency_M[:, None] * in_answer_MV - presence_M[:, None] * answered


def unpack_masks(masks_MW: Tensor, vocab_size: int) -> Tensor:
    """bool [M, V] of int32 words: bit t % 32 of word t // 32."""
    bits = torch.arange(32, device=masks_MW.device, dtype=torch.int32)
    return ((masks_MW[:, :, None] >> bits) & 1).bool().flatten(1)[:, :vocab_size]

"""Drawing tokens from logits: what may be drawn as one threshold a row, and the draw as an argmax of noisy logits.

Gumbel-max: the largest of x / temperature + g, with g independent standard Gumbel noise, is distributed as
softmax(x / temperature). Noise is a pure function of (seed, position, token), see `sampling_noise`: it is the same in
any batch, after a preemption, and on another device but for the rounding of a logarithm.

What top-k, top-p and min-p leave are always the largest logits, so a row's choice is between x >= threshold. Tokens
whose logit equals the threshold stay together. Order: min-p, top-k, top-p, each on what the ones before have left.
Source: Gumbel-max is Maddison, Tarlow, Minka, "A* sampling" (arXiv 1411.0030), section 2; top-p is arXiv 1904.09751;
min-p is arXiv 2407.01082.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tunesmith.kernels.direct import direct
from tunesmith.kernels.nf4 import use_kernel
from tunesmith.kernels.sampling_cpu import choose_on_cpu, largest
from tunesmith.kernels.sampling_noise import BROKEN, gumbel

WIDE = 2048
"""Larger vocabularies are not looked at as a whole on a CPU."""


def choose(
    logits_BV: Tensor,
    temperatures_N: Tensor,
    seeds_N: Tensor,
    slots_B: Tensor,
    positions_B: Tensor,
    last_tokens_N: Tensor,
    thresholds_B: Tensor | None = None,
) -> Tensor:
    """tokens_B int64 on the device, `BROKEN` where a row can't be chosen from. Nothing waits for the device.

    Args: logits_BV: any float dtype, last stride 1. temperatures_N: float32 by slot; 0 takes the largest logit (the
    first of several). seeds_N: int64 by slot. slots_B, positions_B: int64, each row's slot and the position that is
    drawn, below 2^31. last_tokens_N: int64 by slot, is given the tokens (0 for `BROKEN`). thresholds_B: float32;
    logits below it are not drawn.
    """
    if use_kernel(logits_BV.device):
        from tunesmith.kernels.sampling_triton import choose_operator

        launch = direct(choose_operator, logits_BV)
        tokens_B: Tensor = launch(logits_BV, temperatures_N, seeds_N, slots_B, positions_B, last_tokens_N, thresholds_B)
        return tokens_B
    if logits_BV.device.type == "cpu" and logits_BV.shape[-1] > WIDE:
        temperatures_B, seeds_B = temperatures_N.index_select(0, slots_B), seeds_N.index_select(0, slots_B)
        found = choose_on_cpu(logits_BV, temperatures_B, seeds_B, positions_B, thresholds_B)
        last_tokens_N.index_copy_(0, slots_B, found.clamp(min=0))
        return found
    return choose_reference(logits_BV, temperatures_N, seeds_N, slots_B, positions_B, last_tokens_N, thresholds_B)


def choose_reference(
    logits_BV: Tensor,
    temperatures_N: Tensor,
    seeds_N: Tensor,
    slots_B: Tensor,
    positions_B: Tensor,
    last_tokens_N: Tensor,
    thresholds_B: Tensor | None = None,
) -> Tensor:
    """`choose` by plain torch: the truth that the kernel must equal."""
    logits = logits_BV.float()
    temperatures_B = temperatures_N.index_select(0, slots_B)[:, None]
    divisor = torch.where(temperatures_B > 0, temperatures_B, 1.0)
    drawn = logits / divisor + gumbel(seeds_N.index_select(0, slots_B), positions_B, logits.shape[-1])
    scores = torch.where(temperatures_B > 0, drawn, logits)
    if thresholds_B is not None:
        scores = scores.masked_fill(logits < thresholds_B[:, None], -math.inf)
    return _best(scores, slots_B, last_tokens_N)


def choose_greedily(logits_BV: Tensor, slots_B: Tensor, last_tokens_N: Tensor) -> Tensor:
    """`choose` of rows that all take their largest logit, by plain torch (the kernel tells by the temperature)."""
    return _best(logits_BV, slots_B, last_tokens_N)


def _best(scores_BV: Tensor, slots_B: Tensor, last_tokens_N: Tensor) -> Tensor:
    values, tokens = scores_BV.max(-1)
    found = torch.where(values.isfinite(), tokens, BROKEN)
    last_tokens_N.index_copy_(0, slots_B, found.clamp(min=0))
    return found


def find_thresholds(
    logits_BV: Tensor, temperatures_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor
) -> Tensor:
    """thresholds_B float32: what min-p, top-k and top-p leave of each row is its logits that are at least this.

    Args: temperatures_B: float32; rows of 0 get minus infinity. top_k_B: int64, 0 is all. top_p_B: float32 above 0;
    1 is all. min_p_B: float32; 0 is all. Probabilities are of logits / temperature.
    """
    if use_kernel(logits_BV.device):
        from tunesmith.kernels.sampling_thresholds_triton import thresholds_operator

        return thresholds_operator(logits_BV, temperatures_B, top_k_B, top_p_B, min_p_B)
    if logits_BV.device.type == "cpu" and logits_BV.shape[-1] > WIDE:
        part = largest(logits_BV, temperatures_B, top_k_B, top_p_B, min_p_B)
        if part is not None:
            return thresholds_of(part[0], temperatures_B, top_k_B, top_p_B, min_p_B, part[1])
    return thresholds_reference(logits_BV, temperatures_B, top_k_B, top_p_B, min_p_B)


def thresholds_reference(
    logits_BV: Tensor, temperatures_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor
) -> Tensor:
    """`find_thresholds` by one sort: the truth that the kernel must equal."""
    values = logits_BV.float().sort(-1, descending=True).values
    return thresholds_of(values, temperatures_B, top_k_B, top_p_B, min_p_B, None)


def thresholds_of(
    values: Tensor,
    temperatures_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    mass_B: Tensor | None,
) -> Tensor:
    """Thresholds from the largest logits [B, number], descending. mass_B: of whole rows, where these are a part."""
    num = values.shape[-1]
    temperatures = torch.where(temperatures_B > 0, temperatures_B, 1.0)[:, None]
    relative = (values - values[:, :1]) / temperatures
    kept = (relative >= min_p_B.log()[:, None]) & (values > -math.inf)
    last_k = torch.where((top_k_B > 0) & (top_k_B < num), top_k_B, num) - 1
    kept &= values >= values.gather(1, last_k[:, None])
    mass = torch.where(kept, relative.exp(), 0.0)
    whole_B = mass.sum(-1)
    if mass_B is not None:
        whole_B = torch.where((top_k_B == 0) & (min_p_B == 0), mass_B, whole_B)
    before = mass.cumsum(-1) - mass
    kept &= (before < (top_p_B * whole_B)[:, None]) | (top_p_B >= 1)[:, None]
    last = (kept.sum(-1, keepdim=True) - 1).clamp(min=0)
    return torch.where(temperatures_B > 0, values.gather(1, last)[:, 0], -math.inf)

"""Drawing tokens from logits: what may be drawn as one threshold a row, and the draw as an argmax of noisy logits.

Gumbel-max: the largest of x / temperature + g, with g independent standard Gumbel noise, is distributed as
softmax(x / temperature). Noise is a pure function of (seed, position, token): it is the same in any batch, after a
preemption, and on another device but for the rounding of a logarithm. The counter of the generator Philox4x32 is
(token mod Q, position, site, 0), the word token div Q, where Q is a quarter of the vocabulary, rounded up to 64.

What top-k, top-p and min-p leave are always the largest logits, so a row's choice is between x >= threshold. Tokens
whose logit equals the threshold stay together. Order: min-p, top-k, top-p, each on what the ones before have left.
Source: Gumbel-max is Maddison, Tarlow, Minka, "A* sampling" (arXiv 1411.0030), section 2; top-p is arXiv 1904.09751;
min-p is arXiv 2407.01082.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tunesmith.kernels.nf4 import use_kernel
from tunesmith.kernels.philox import philox
from tunesmith.units import ceil_div

BROKEN = -1
"""In place of a token where a row's largest logit is not a finite number."""
SITE = 0x5A11
"""Tells this noise from other uses of the same seed."""
SERIES_BELOW = 2.0**-6


def quarter(vocab_size: int) -> int:
    """Tokens that share one word of the generator's four: every fourth strip of the vocabulary."""
    return 64 * ceil_div(vocab_size, 256)


def choose(
    logits_BV: Tensor,
    temperatures_B: Tensor,
    seeds_B: Tensor,
    positions_B: Tensor,
    thresholds_B: Tensor | None = None,
) -> Tensor:
    """tokens_B int64 on the device, `BROKEN` where a row can't be chosen from. Nothing waits for the device.

    Args: logits_BV: any float dtype, last stride 1. temperatures_B: float32; 0 takes the largest logit (the first of
    several). seeds_B, positions_B: int64; positions below 2^31. thresholds_B: float32, none below it is drawn.
    """
    if not use_kernel(logits_BV.device):
        return choose_reference(logits_BV, temperatures_B, seeds_B, positions_B, thresholds_B)
    from tunesmith.kernels.sampling_triton import choose_operator

    return choose_operator(logits_BV, temperatures_B, seeds_B, positions_B, thresholds_B)


def choose_reference(
    logits_BV: Tensor,
    temperatures_B: Tensor,
    seeds_B: Tensor,
    positions_B: Tensor,
    thresholds_B: Tensor | None = None,
) -> Tensor:
    """`choose` by plain torch: the truth that the kernel must equal."""
    logits = logits_BV.float()
    divisor = torch.where(temperatures_B > 0, temperatures_B, 1.0)[:, None]
    drawn = logits / divisor + gumbel(seeds_B, positions_B, logits.shape[-1])
    scores = torch.where(temperatures_B[:, None] > 0, drawn, logits)
    if thresholds_B is not None:
        scores = scores.masked_fill(logits < thresholds_B[:, None], -math.inf)
    values, tokens = scores.max(-1)
    return torch.where(values.isfinite(), tokens, BROKEN)


def choose_greedily(logits_BV: Tensor) -> Tensor:
    """tokens_B of the largest logits, `BROKEN` where a row has none."""
    if use_kernel(logits_BV.device):
        from tunesmith.kernels.sampling_triton import greedy_operator

        return greedy_operator(logits_BV)
    values, tokens = logits_BV.max(-1)
    return torch.where(values.isfinite(), tokens, BROKEN)


def gumbel(seeds_B: Tensor, positions_B: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise, float32 [B, V]."""
    strip = quarter(vocab_size)
    columns = torch.arange(strip, device=seeds_B.device).expand(len(seeds_B), strip)
    rows = positions_B[:, None].expand(len(seeds_B), strip)
    words = philox(columns, rows, SITE, seeds_B[:, None])
    word = torch.cat(words, dim=1)[:, :vocab_size]
    return -exponential(word).log()


def exponential(word: Tensor) -> Tensor:
    """Standard exponential noise, float32, of words from 0 to below 2^32. Small values, which win, are exact in all
    their bits: -log(1 - u) is a series where u is small, so that a large Gumbel value is as likely as it should be."""
    u = ((word.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4))))
    return torch.where(u < SERIES_BELOW, series, -(1 - u).log())


def find_thresholds(
    logits_BV: Tensor, temperatures_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor
) -> Tensor:
    """thresholds_B float32: what min-p, top-k and top-p leave of each row is its logits that are at least this.

    Args: temperatures_B: float32; rows of 0 get minus infinity. top_k_B: int64, 0 is all. top_p_B: float32 above 0;
    1 is all. min_p_B: float32; 0 is all. Probabilities are of logits / temperature.
    """
    return thresholds_reference(logits_BV, temperatures_B, top_k_B, top_p_B, min_p_B)


def thresholds_reference(
    logits_BV: Tensor, temperatures_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor
) -> Tensor:
    """`find_thresholds` by one sort: the truth that the kernel must equal."""
    values = logits_BV.float().sort(-1, descending=True).values
    num = values.shape[-1]
    temperatures = torch.where(temperatures_B > 0, temperatures_B, 1.0)[:, None]
    relative = (values - values[:, :1]) / temperatures
    kept = relative >= min_p_B.log()[:, None]
    last_k = torch.where((top_k_B > 0) & (top_k_B < num), top_k_B, num) - 1
    kept &= values >= values.gather(1, last_k[:, None])
    mass = torch.where(kept, relative.exp(), 0.0)
    before = mass.cumsum(-1) - mass
    kept &= (before < top_p_B[:, None] * mass.sum(-1, keepdim=True)) | (top_p_B >= 1)[:, None]
    last = (kept.sum(-1, keepdim=True) - 1).clamp(min=0)
    return torch.where(temperatures_B > 0, values.gather(1, last)[:, 0], -math.inf)

"""Draws and thresholds on a CPU: only tokens that can win are given noise, only the largest logits are sorted.

best of the likeliest tokens, noise and all      |
a token whose logit lies further below it than noise ever reaches can't win, and gets none
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.kernels.philox import philox
from tunesmith.kernels.sampling_noise import BROKEN, SITE, exponential, quarter

NEAR = 3.0
"""Tokens at most so far below the likeliest, in temperatures, get noise first."""
SORTED = 1024
"""Logits of a row that are sorted; the others only where these are not enough."""
MOST_NOISE = 23.0
"""No noise is larger: -log of the least exponential value, 2^-33, and a little."""
MOST_SHARE = 0.25
"""Of a vocabulary: where more tokens can win, noise for all costs less than for each of them alone."""


def choose_on_cpu(
    logits_BV: Tensor, temperatures_B: Tensor, seeds_B: Tensor, positions_B: Tensor, thresholds_B: Tensor | None
) -> Tensor:
    """tokens_B as `choose_reference` gives them."""
    limits = [None] * len(logits_BV) if thresholds_B is None else thresholds_B.tolist()
    given = zip(logits_BV, temperatures_B.tolist(), seeds_B, positions_B, limits, strict=True)
    return torch.tensor([_choose(row.float(), *others) for row, *others in given], dtype=torch.int64)


def _choose(row_V: Tensor, temperature: float, seed: Tensor, position: Tensor, threshold: float | None) -> int:
    highest, token = row_V.max(-1)
    if not bool(highest.isfinite()):
        return BROKEN
    if temperature <= 0:
        return int(token)
    vocab_size = len(row_V)
    if threshold is None or threshold == -torch.inf:
        ids = torch.nonzero(row_V >= highest - NEAR * temperature)[:, 0]
        best = (row_V[ids] / temperature + gumbel_of(ids, seed, position, vocab_size)).max()
        ids = torch.nonzero(row_V >= (best - MOST_NOISE) * temperature)[:, 0]
    else:
        ids = torch.nonzero(row_V >= threshold)[:, 0]
    scores = row_V[ids] / temperature + gumbel_of(ids, seed, position, vocab_size)
    return int(ids[scores.argmax()])


def gumbel_of(tokens_C: Tensor, seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """The noise of some tokens of one row, float32 [C]: `sampling_noise.gumbel` at these."""
    strip = quarter(vocab_size)
    if len(tokens_C) > MOST_SHARE * vocab_size:
        columns = torch.arange(strip)
        word = torch.cat(philox(columns, position.expand(strip), SITE, seed))[tokens_C]
    else:
        words = torch.stack(philox(tokens_C % strip, position.expand(len(tokens_C)), SITE, seed))
        word = words.gather(0, (tokens_C // strip)[None])[0]
    return -exponential(word).log()


def largest(
    logits_BV: Tensor, temperatures_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor
) -> tuple[Tensor, Tensor] | None:
    """What decides the thresholds: the largest logits, descending, and the mass of whole rows over their maximum's.

    None where these are not enough for some row.
    """
    values = logits_BV.topk(SORTED).values.float()
    temperatures = torch.where(temperatures_B > 0, temperatures_B, 1.0)[:, None]
    mass_B = ((logits_BV.float() - values[:, :1]) / temperatures).exp().sum(-1)
    relative = (values - values[:, :1]) / temperatures
    by_count = (top_k_B > 0) & (top_k_B <= SORTED)
    by_share = relative[:, -1] < min_p_B.log()
    by_mass = (top_k_B == 0) & (min_p_B == 0) & (relative.exp().sum(-1) >= top_p_B * mass_B)
    if not bool((by_count | by_share | by_mass | (temperatures_B == 0)).all()):
        return None
    return values, mass_B

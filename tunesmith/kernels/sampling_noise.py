"""Noise of draws, by plain torch: standard Gumbel values as a pure function of (seed, position, token).

The counter of the generator Philox4x32 is (token mod Q, position, site, 0), the key the seed's 64 bits, and the word
token div Q, where Q is a quarter of the vocabulary, rounded up to 64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.kernels.philox import philox
from tunesmith.units import ceil_div

BROKEN = -1
"""In place of a token where a row's largest logit is not a finite number."""
SITE = 0x5A11
"""Tells this noise from other uses of the same seed."""
SERIES_BELOW = 2.0**-6


def quarter(vocab_size: int) -> int:
    """Q: tokens that share one word of the generator's four."""
    return 64 * ceil_div(vocab_size, 256)


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

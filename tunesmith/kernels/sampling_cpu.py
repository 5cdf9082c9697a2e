"""Draws and thresholds on a CPU: only tokens that can win are given noise, only the largest logits are sorted.

best of the likeliest tokens, noise and all      |
a token whose logit lies further below it than noise ever reaches can't win, and gets none

All rows of a step go together: what an operation costs is mostly its call. Random words are made by numpy, whose calls
cost a third of torch's.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.kernels.philox import ROUNDS
from tunesmith.kernels.sampling_noise import BROKEN, SITE, exponential, quarter

Words = NDArray[np.uint64]
Places = NDArray[np.int64]
NEAR = 2.0
"""Tokens at most so far below the likeliest, in temperatures, get noise first."""
SORTED = 1024
"""Logits of a row that are sorted; the others only where these are not enough."""
MOST_NOISE = 23.0
"""No noise is larger: -log of the least exponential value, 2^-33, and a little."""
MOST_SHARE = 0.125
"""Of a vocabulary: where more tokens can win, words for all cost less than for each of them alone."""
SMALL = 2**16
"""Where rows have so many logits together, all get noise: that is cheaper than finding out which can win."""
WORD_SLACK = 1.00001
"""More than rounding can make of the largest word that can win."""
_MULTIPLIERS = np.array([[0xCD9E8D57], [0xD2511F53]], dtype=np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_MASK, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def choose_on_cpu(
    logits_BV: Tensor, temperatures_B: Tensor, seeds_B: Tensor, positions_B: Tensor, thresholds_B: Tensor | None
) -> Tensor:
    """tokens_B as `choose_reference` gives them."""
    highest_B, tokens_B = logits_BV.max(-1)
    is_broken = ~highest_B.isfinite()
    drawn = torch.nonzero((temperatures_B > 0) & ~is_broken)[:, 0]
    if len(drawn):
        is_all = len(drawn) == len(logits_BV)
        logits = logits_BV.float() if is_all else logits_BV.index_select(0, drawn).float()
        limits = None if thresholds_B is None else thresholds_B.index_select(0, drawn)
        rows = _Rows(logits, temperatures_B[drawn], seeds_B[drawn], positions_B[drawn])
        found = torch.from_numpy(rows.choose(limits))
        tokens_B = found if is_all else tokens_B.index_copy(0, drawn, found)
    return tokens_B.masked_fill(is_broken, BROKEN)


class _Rows:
    """Rows that are drawn, logits in float32."""

    def __init__(self, logits_BV: Tensor, temperatures_B: Tensor, seeds_B: Tensor, positions_B: Tensor) -> None:
        self.logits = logits_BV
        self.temperatures = temperatures_B
        self.seeds = seeds_B.numpy().view(np.uint64)
        self.positions = positions_B.numpy().astype(np.uint64)
        self.strip = quarter(logits_BV.shape[1])

    def choose(self, thresholds_B: Tensor | None) -> Places:
        """The token of each row."""
        if self.logits.numel() <= SMALL:
            return self._best_of_all(thresholds_B)
        if thresholds_B is not None and bool(thresholds_B.isfinite().all()):
            return self._best(*self._at_least(thresholds_B))[0]
        highest = self.logits.amax(-1)
        limit = highest - NEAR * self.temperatures
        limit = limit if thresholds_B is None else limit.maximum(thresholds_B)
        best = torch.from_numpy(self._best(*self._at_least(limit))[1])
        limit = (best - MOST_NOISE) * self.temperatures
        limit = limit if thresholds_B is None else limit.maximum(thresholds_B)
        if int((self.logits >= limit[:, None]).sum()) <= MOST_SHARE * self.logits.numel():
            return self._best(*self._at_least(limit))[0]
        # Noise of at least best - highest / temperature is wanted, and -log(1 - u) is at least u.
        reach = (highest / self.temperatures - best).double().exp_() * 2.0**32 * WORD_SLACK + 1
        return self._best(*self._with_small_words(reach.tolist(), limit))[0]

    def _best_of_all(self, thresholds_B: Tensor | None) -> Places:
        """The token of each row, every logit with its noise."""
        num, vocab_size = self.logits.shape
        columns = np.tile(np.arange(self.strip, dtype=np.uint64), num)
        words = words_of(columns, self.positions.repeat(self.strip), self.seeds.repeat(self.strip))
        word = torch.from_numpy(words.view(np.int64)).view(4, num, self.strip).transpose(0, 1)
        noise = exponential(word).log_().reshape(num, -1)[:, :vocab_size]
        scores = (self.logits / self.temperatures[:, None]).sub_(noise)
        if thresholds_B is not None:
            scores.masked_fill_(self.logits < thresholds_B[:, None], -torch.inf)
        tokens: Places = scores.argmax(-1).numpy()
        return tokens

    def _at_least(self, limit_B: Tensor) -> tuple[Places, Places]:
        """Rows and tokens of the logits that are at least this, in order; at least one of every row."""
        rows, tokens = torch.nonzero(self.logits >= limit_B[:, None], as_tuple=True)
        return rows.numpy(), tokens.numpy()

    def _with_small_words(self, reach: list[float], limit_B: Tensor) -> tuple[Places, Places]:
        """Rows and tokens whose words are small enough to win: words of the whole vocabulary, and few numbers left."""
        columns = np.arange(self.strip, dtype=np.uint64)
        limits = limit_B.tolist()

        def small(row: int) -> Places:
            words = words_of(columns, self.positions[row : row + 1], self.seeds[row : row + 1])
            most = np.uint64(min(reach[row], int(_MASK)))
            tokens = np.flatnonzero(words.reshape(-1)[: self.logits.shape[1]] <= most)
            return tokens[self.logits[row].numpy()[tokens] >= limits[row]]

        # numpy lets go of the interpreter while it computes on arrays as long as these.
        found = list(_threads().map(small, range(len(reach)))) if len(reach) > 1 else [small(0)]
        return np.repeat(np.arange(len(found)), [len(tokens) for tokens in found]), np.concatenate(found)

    def _best(self, rows: Places, tokens: Places) -> tuple[Places, NDArray[np.float32]]:
        """Of every row the token of the largest score among these, the first of several, and that score."""
        words = words_of((tokens % self.strip).astype(np.uint64), self.positions[rows], self.seeds[rows])
        word = np.take_along_axis(words, (tokens // self.strip)[None], axis=0)[0]
        noise = -exponential(torch.from_numpy(word.view(np.int64))).log()
        places = torch.from_numpy(rows)
        logits = self.logits[places, torch.from_numpy(tokens)]
        scores = (logits / self.temperatures[places] + noise).numpy()
        starts = np.searchsorted(rows, np.arange(len(self.logits))).tolist()
        ends = [*starts[1:], len(rows)]
        won = [start + int(scores[start:end].argmax()) for start, end in zip(starts, ends, strict=True)]
        return tokens[won], scores[won]


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(torch.get_num_threads(), "sampling")


def words_of(columns: Words, positions: Words, seeds: Words) -> Words:
    """Words [4, C] as `philox` gives them of the counters (columns, positions, SITE, 0): two of its lanes at once."""
    num = len(columns)
    lanes, others, products = np.empty((3, 2, num), dtype=np.uint64)
    lanes[0], lanes[1], others[0], others[1] = columns, SITE, positions, 0
    keys = np.empty((2, len(seeds)), dtype=np.uint64)
    keys[0], keys[1] = seeds & _MASK, seeds >> _HALF
    for _ in range(ROUNDS):
        np.multiply(lanes[::-1], _MULTIPLIERS, out=products)
        np.right_shift(products, _HALF, out=lanes)
        np.bitwise_xor(lanes, others, out=lanes)
        np.bitwise_xor(lanes, keys, out=lanes)
        np.bitwise_and(products, _MASK, out=others)
        keys = (keys + _WEYL) & _MASK
    words = np.empty((4, num), dtype=np.uint64)
    words[0::2], words[1::2] = lanes, others
    return words


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

"""The counter-based generator Philox4x32: random words as a function of a counter and a key, with no state.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), sections 3.3 and 4:
seven rounds pass BigCrush.
"""

from __future__ import annotations

from torch import Tensor

ROUNDS = 7
WORD = 31
"""Bits of a word that a probability is compared with."""
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(c0: Tensor, c1: Tensor, site: int, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words, each int64 from 0 to below 2^32, of the counter (c0, c1, site, 0) under the key `seed`."""
    c2, c3 = c0 * 0 + site, c0 * 0
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(ROUNDS):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # modulo 2^64: the bits are right
        c0, c1 = ((second >> 32) & _MASK) ^ c1 ^ k0, second & _MASK
        c2, c3 = ((first >> 32) & _MASK) ^ c3 ^ k1, first & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3

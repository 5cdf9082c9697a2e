"""What an 8-bit AdamW update takes: numbers, moments, codebooks. Source: arXiv 2110.02861, section 1.2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 256


@dataclass(frozen=True)
class AdamSettings:
    """The numbers of one update. number: which one it is for the parameter, from 1."""

    number: int
    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    @property
    def corrections(self) -> tuple[float, float]:
        """What the two moments are divided by, for having begun at zero."""
        return 1 - self.betas[0] ** self.number, 1 - self.betas[1] ** self.number


@dataclass(frozen=True)
class Moments:
    """The two moments of a parameter of N values. codes: uint8 [N]; absmax: float32 [ceil(N / 256)]."""

    mean_codes: Tensor
    mean_absmax: Tensor
    square_codes: Tensor
    square_absmax: Tensor

    def slices(self, size: int) -> Iterator[tuple[slice, Moments]]:
        """Parts of `size` values, a multiple of the block, and where they are."""
        count = self.mean_codes.numel()
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            blocks = slice(start // BLOCK, -(-part.stop // BLOCK))
            yield (
                part,
                Moments(
                    self.mean_codes[part],
                    self.mean_absmax[blocks],
                    self.square_codes[part],
                    self.square_absmax[blocks],
                ),
            )


@lru_cache
def dynamic_codebook(signed: bool) -> Tensor:
    """The 256 values of dynamic tree quantisation, float32, ascending, in [-1, 1] or [0, 1].

    A code is a decimal exponent written in unary and a linear fraction in the bits that are left: the decade
    [10^(i-7), 10^(i-6)) is cut into 2^i equal parts (2^(i+1) when no bit goes to the sign), i = 0..6, and each
    is represented by its middle; 0 and 1 are exact.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        parts = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float64)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
        values += middles + ([-middle for middle in middles] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


@lru_cache
def codebook_on(signed: bool, device: torch.device) -> Tensor:
    """`dynamic_codebook` on `device`."""
    return dynamic_codebook(signed).to(device)


@lru_cache
def midpoints_on(signed: bool, device: torch.device) -> Tensor:
    """Where one code ends and the next begins, float32 [255]; what lies on one belongs to the lower code."""
    book = dynamic_codebook(signed)
    return ((book[1:] + book[:-1]) / 2).to(device)

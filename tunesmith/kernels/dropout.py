"""Dropout whose mask is a pure function of a seed and of the place of every element, so that it is never held.

Whether element (row, column) of site s is kept is one word of the counter-based generator Philox4x32, seven rounds:
the counter is (column mod ceil(D / 4), row, s, 0), the word column div ceil(D / 4), and the key the 64 bits of the
seed. The seed is read from the device, so that recorded launches draw a new mask when another seed is put there.
Source: arXiv 1207.0580; the generator's is in `tunesmith.kernels.philox`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tunesmith.kernels.nf4 import use_kernel
from tunesmith.kernels.philox import WORD, philox
from tunesmith.units import ceil_div


@dataclass(frozen=True)
class Noise:
    """Where masks come from in one forward pass and its backward pass.

    seed: int64 [1] on the device, not written before the backward pass is over. first_row: the place, in the whole,
    of the first row of what is masked.
    """

    seed: Tensor
    first_row: int = 0

    def after(self, rows: int) -> Noise:
        """The same for what begins so many rows later."""
        return replace(self, first_row=self.first_row + rows)


def dropout(x_TD: Tensor, noise: Noise, site: int, probability: float) -> Tensor:
    """x / (1 - probability) where the mask keeps it, else zero: contiguous, of x's dtype.

    Args: x_TD: two dimensions. site: tells masks of the same seed apart. probability: at least 0, below 1.
    """
    threshold, scale = threshold_of(probability), 1.0 / (1.0 - probability)
    if not use_kernel(x_TD.device):
        return dropout_reference(x_TD, noise, site, probability)
    from tunesmith.kernels.dropout_triton import dropout_operator

    return dropout_operator(x_TD, noise.seed, site, noise.first_row, threshold, scale)


def add_dropout_(out_TD: Tensor, x_TD: Tensor, noise: Noise, site: int, probability: float) -> None:
    """out += dropout(x), added in float32 and rounded once."""
    threshold, scale = threshold_of(probability), 1.0 / (1.0 - probability)
    if not use_kernel(x_TD.device):
        add_dropout_reference_(out_TD, x_TD, noise, site, probability)
        return
    from tunesmith.kernels.dropout_triton import add_dropout_operator

    add_dropout_operator(out_TD, x_TD, noise.seed, site, noise.first_row, threshold, scale)


def dropout_reference(x_TD: Tensor, noise: Noise, site: int, probability: float) -> Tensor:
    """dropout by plain torch: the truth that the kernel must equal."""
    return _masked(x_TD, noise, site, probability).to(x_TD.dtype)


def add_dropout_reference_(out_TD: Tensor, x_TD: Tensor, noise: Noise, site: int, probability: float) -> None:
    """add_dropout_ by plain torch."""
    out_TD.copy_(out_TD.float() + _masked(x_TD, noise, site, probability))


def kept(rows: int, columns: int, noise: Noise, site: int, probability: float) -> Tensor:
    """The mask, bool [rows, columns], by plain torch."""
    device = noise.seed.device
    quarter = ceil_div(columns, 4)
    row = (torch.arange(rows, device=device) + noise.first_row)[:, None].expand(rows, quarter)
    words = philox(torch.arange(quarter, device=device).expand(rows, quarter), row, site, noise.seed)
    return (torch.cat(words, dim=1)[:, :columns] >> (32 - WORD)) >= threshold_of(probability)


def threshold_of(probability: float) -> int:
    """A word of `WORD` bits below this is dropped."""
    if not 0 <= probability < 1:
        raise ValueError(f"a probability of dropout is at least 0 and below 1, got {probability}")
    return min(round(probability * 2**WORD), 2**WORD - 1)


def _masked(x_TD: Tensor, noise: Noise, site: int, probability: float) -> Tensor:
    rows, columns = x_TD.shape
    mask = kept(rows, columns, noise, site, probability)
    return x_TD.float() * mask * (1.0 / (1.0 - probability))

"""Tables of the values that a code stands for, derived from their definitions."""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

# The probability of NF4's outermost value: the mean of the outermost bins of 15 and of 16 values.
NF4_TAIL = 0.9677083


@cache
def nf4_values(device: torch.device) -> Tensor:
    """NF4's 16 values, ascending from -1 to 1: float32 [16].

    Quantiles of the normal distribution, 8 above zero and 7 below, zero itself, divided by the largest.
    The probabilities are spaced in float32, as the format's first implementation did: its bits are the format.
    Source: arXiv 2305.14314, section 3 and appendix E.
    """
    quantile = NormalDist().inv_cdf
    above = [quantile(float(p)) for p in torch.linspace(NF4_TAIL, 0.5, 9)[:-1]]
    below = [-quantile(float(p)) for p in torch.linspace(NF4_TAIL, 0.5, 8)[:-1]]
    values = torch.tensor(sorted([*above, 0.0, *below]))
    return (values / values.max()).to(device)


@cache
def dynamic_values(device: torch.device, signed: bool = True) -> Tensor:
    """The 256 values of the 8-bit dynamic data type, ascending: float32 [256].

    A leading run of zeros is the decimal exponent (0 to -6), the bits after it a linear fraction in [0.1, 1);
    each value is the middle of its interval; zero and one are added. Unsigned, the sign bit widens the fraction.
    Source: arXiv 2110.02861, section 2.
    """
    values = [0.0, 1.0]
    for exponent in range(-6, 1):
        num_fractions = 2 ** (6 + exponent + (not signed))
        edges = torch.linspace(0.1, 1, num_fractions + 1)
        middles = (edges[:-1] + edges[1:]) / 2.0
        values += (10**exponent * middles).tolist()
        if signed:
            values += (-(10**exponent) * middles).tolist()
    values += [0.0] * (256 - len(values))
    return torch.tensor(sorted(values)).to(device)


@cache
def midpoints(values: Tensor) -> Tensor:
    """Halfway between neighbouring values: what separates one code from the next."""
    return (values[:-1] + values[1:]) / 2

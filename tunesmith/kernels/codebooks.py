"""Tables of the values that a code stands for, derived from their definitions."""

from __future__ import annotations

from fractions import Fraction
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


def midpoints(values: Tensor) -> Tensor:
    """Halfway between neighbouring values: what separates one code from the next."""
    return (values[:-1] + values[1:]) / 2


@cache
def nf4_bounds(device: torch.device) -> Tensor:
    """What separates NF4's codes: float32 [15].

    Some midpoints lie halfway between two float32 numbers. On a CPU bitsandbytes computes them in float32; its CUDA
    kernel has them as literals of 16 decimals, which break the tie.
    """
    values = nf4_values(torch.device("cpu"))
    if device.type != "cuda":
        return midpoints(values).to(device)
    literals = [f"{middle:.16f}" for middle in midpoints(values.double()).tolist()]
    return torch.tensor([_nearest_float32(literal) for literal in literals]).to(device)


def _nearest_float32(literal: str) -> float:
    """The float32 number nearest to a decimal, without rounding to float64 first."""
    first = torch.tensor(float(literal), dtype=torch.float32)
    ends = [torch.nextafter(first, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    candidates = [float(candidate) for candidate in (first, *ends)]
    return min(candidates, key=lambda candidate: abs(Fraction(candidate) - Fraction(literal)))

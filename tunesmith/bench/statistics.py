"""Medians and bootstrap intervals of what was timed.

Source of the bootstrap: Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7(1), 1979.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A median and its bootstrap interval, in the unit of the samples; `count` samples in `groups` repeats."""

    median: float
    low: float
    high: float
    count: int
    groups: int = 1

    def overlaps(self, other: Estimate) -> bool:
        """Whether the two intervals share a value: then the difference may be noise."""
        return self.low <= other.high and other.low <= self.high


def estimate(groups: Sequence[Sequence[float]], *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate | None:
    """The median over all samples with a 95 % interval; None where there is no sample.

    Samples come in groups, one for each repeat of a cell: repeats are drawn first and samples within them second, so
    that an interval tells how much whole processes differ, not only steps of one. Samples that are not finite are left
    out.
    """
    clean = [[value for value in group if math.isfinite(value)] for group in groups]
    clean = [group for group in clean if group]
    if not clean:
        return None
    pooled = [value for group in clean for value in group]
    low, high = _interval(_resampled_medians(clean, random.Random(seed), resamples))
    median = statistics.median(pooled)
    return Estimate(median, min(low, median), max(high, median), len(pooled), len(clean))


def _resampled_medians(groups: Sequence[Sequence[float]], generator: random.Random, resamples: int) -> list[float]:
    medians = []
    for _ in range(resamples):
        drawn = generator.choices(groups, k=len(groups))
        medians.append(statistics.median([v for group in drawn for v in generator.choices(group, k=len(group))]))
    return sorted(medians)


def _interval(ordered: Sequence[float]) -> tuple[float, float]:
    tail = (1 - LEVEL) / 2
    last = len(ordered) - 1
    return ordered[math.floor(tail * last)], ordered[math.ceil((1 - tail) * last)]


def ratio(new: Sequence[Sequence[float]], old: Sequence[Sequence[float]], *, seed: int = 0) -> Estimate | None:
    """median(new) / median(old) with a 95 % interval; None where either has no sample."""
    top, bottom = estimate(new, seed=seed), estimate(old, seed=seed + 1)
    if top is None or bottom is None or bottom.median == 0:
        return None
    tops = _resampled_medians([list(g) for g in new if g], random.Random(seed), RESAMPLES)
    bottoms = _resampled_medians([list(g) for g in old if g], random.Random(seed + 1), RESAMPLES)
    # Sorted medians of two independent draws would pair rank with rank, so one side is shuffled.
    random.Random(seed + 2).shuffle(bottoms)
    ratios = sorted(t / b for t, b in zip(tops, bottoms, strict=True) if b)
    low, high = _interval(ratios)
    median = top.median / bottom.median
    return Estimate(median, min(low, median), max(high, median), top.count + bottom.count, top.groups)

"""Medians, intervals and ratios."""

from __future__ import annotations

import math
import random

from tunesmith.bench.statistics import estimate, ratio


def samples(mean: float, spread: float, count: int, seed: int) -> list[float]:
    generator = random.Random(seed)
    return [generator.gauss(mean, spread) for _ in range(count)]


def test_median_lies_in_its_interval_and_is_reproducible() -> None:
    groups = [samples(1.0, 0.1, 12, 0), samples(1.0, 0.1, 12, 1)]
    first = estimate(groups)
    assert first is not None
    assert first.low <= first.median <= first.high
    assert first == estimate(groups)
    assert (first.count, first.groups) == (24, 2)


def test_nothing_measured_is_none() -> None:
    assert estimate([]) is None
    assert estimate([[], [math.nan, math.inf]]) is None
    assert ratio([[1.0]], []) is None


def test_a_single_sample_is_its_own_interval() -> None:
    only = estimate([[2.5]])
    assert only is not None
    assert (only.low, only.median, only.high) == (2.5, 2.5, 2.5)


def test_interval_narrows_with_more_samples() -> None:
    few, many = estimate([samples(1, 0.1, 8, 0)]), estimate([samples(1, 0.1, 200, 0)])
    assert few is not None
    assert many is not None
    assert many.high - many.low < few.high - few.low


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """95 % nominal; with 15 samples a percentile bootstrap of the median covers somewhat less or more."""
    hits = 0
    for seed in range(60):
        found = estimate([samples(1, 0.1, 15, seed)], seed=seed, resamples=300)
        assert found is not None
        hits += found.low <= 1 <= found.high
    assert hits >= 50


def test_repeats_that_differ_widen_the_interval() -> None:
    """Steps inside one process agree; processes don't: the interval must show it."""
    alike = estimate([samples(1.0, 0.01, 20, 0), samples(1.0, 0.01, 20, 1)])
    apart = estimate([samples(0.9, 0.01, 20, 0), samples(1.1, 0.01, 20, 1)])
    assert alike is not None
    assert apart is not None
    assert apart.high - apart.low > 5 * (alike.high - alike.low)


def test_ratio_of_known_samples() -> None:
    found = ratio([samples(2.0, 0.05, 40, 0)], [samples(1.0, 0.05, 40, 1)])
    assert found is not None
    assert abs(found.median - 2) < 0.1
    assert 1.8 < found.low <= found.median <= found.high < 2.2


def test_equal_samples_have_a_ratio_interval_around_one() -> None:
    found = ratio([samples(1.0, 0.05, 20, 0)], [samples(1.0, 0.05, 20, 1)])
    assert found is not None
    assert found.low <= 1 <= found.high

"""Learning rates by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from tunesmith.recipe.schema import TrainSection
from tunesmith.train.schedules import learning_rate, warmup_steps


def _rates(total: int, **settings: object) -> list[float]:
    section = TrainSection(learning_rate=1.0, **settings)
    return [learning_rate(section, step, total) for step in range(total)]


def test_warmup_rises_to_the_peak_and_cosine_falls() -> None:
    rates = _rates(10, warmup_ratio=0.2, schedule="cosine")
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)
    assert rates[9] == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)
    assert all(later < earlier for earlier, later in pairwise(rates[2:]))


def test_linear_ends_at_its_floor() -> None:
    rates = _rates(4, warmup_ratio=0.0, schedule="linear", min_learning_rate_ratio=0.2)
    assert rates == pytest.approx([1.0, 0.8, 0.6, 0.4])
    section = TrainSection(learning_rate=1.0, schedule="linear", min_learning_rate_ratio=0.2, warmup_ratio=0.0)
    assert learning_rate(section, 4, 4) == pytest.approx(0.2)
    assert learning_rate(section, 100, 4) == pytest.approx(0.2)


def test_constant_stays() -> None:
    assert _rates(5, warmup_ratio=0.0, schedule="constant") == [1.0] * 5


@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.5, 1.0])
def test_warmup_never_takes_all_steps(ratio: float) -> None:
    section = TrainSection(warmup_ratio=ratio)
    for total in (1, 2, 7, 100):
        assert 0 <= warmup_steps(section, total) < total or total == 1
        assert learning_rate(section, 0, total) > 0

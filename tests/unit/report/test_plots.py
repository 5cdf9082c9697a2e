"""The geometry of labels and the frontier."""

from __future__ import annotations

from itertools import pairwise

from tunesmith.report.plots import frontier, spread, within


def test_spread_keeps_order_and_distance() -> None:
    placed = spread([5.0, 2.01, 2.0, 1.99, 1.0], 0.5)
    assert all(above - below >= 0.5 - 1e-9 for above, below in pairwise(placed))
    assert placed[0] == 5.0


def test_spread_leaves_what_is_apart_alone() -> None:
    assert spread([3.0, 2.0, 1.0], 0.5) == [3.0, 2.0, 1.0]


def test_frontier_holds_what_nothing_beats() -> None:
    points = [(4.0, 1.0), (1.0, 4.0), (2.0, 2.0), (3.0, 3.0), (2.0, 5.0)]
    assert frontier(points) == [(1.0, 4.0), (2.0, 2.0), (4.0, 1.0)]


def test_labels_stay_within_the_axes() -> None:
    assert within([0.5, 0.0, -0.5], 0.0, 8.0) == [1.0, 0.5, 0.0]
    assert within([9.0, 8.5], 0.0, 8.0) == [8.0, 7.5]
    assert within([3.0, 2.0], 0.0, 8.0) == [3.0, 2.0]
    assert within([9.0, 4.0, -1.0], 0.0, 8.0)[0] == 8.0

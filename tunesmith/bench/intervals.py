"""Arithmetic on stretches of time: (start, end) pairs in one unit, half open."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time as stretches in order that neither touch nor overlap. Empty ones are dropped."""
    joined: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[1] > interval[0]):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def length(intervals: Iterable[Interval]) -> float:
    """How long all of them last together, what overlaps once."""
    return sum(end - start for start, end in union(intervals))


def without(intervals: Iterable[Interval], others: Iterable[Interval]) -> list[Interval]:
    """The time in `intervals` that is in none of `others`."""
    holes = union(others)
    left: list[Interval] = []
    at = 0
    for start, end in union(intervals):
        while at < len(holes) and holes[at][1] <= start:
            at += 1
        left += _cut(start, end, islice(holes, at, None))
    return left


def _cut(start: float, end: float, holes: Iterable[Interval]) -> list[Interval]:
    """What is left of one stretch; `holes` are in order, none ends before it begins."""
    left = []
    for begin, stop in holes:
        if begin >= end:
            break
        if begin > start:
            left.append((start, begin))
        start = stop
    return [*left, (start, end)] if start < end else left

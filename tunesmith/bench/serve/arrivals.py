"""When requests are sent.

    open     a Poisson process: requests come whether or not earlier ones were answered, as users do
    closed   as many in flight as the concurrency says: one is sent when one has ended
    trace    as the data's own times say, sped up by a factor

An open loop is the honest one for latency: a slow server can't slow down who measures it.
Source: Schroeder et al., "Open versus closed: a cautionary tale", NSDI 2006.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tunesmith.bench.serve.workload import Item
from tunesmith.errors import RecipeError

Mode = Literal["open", "closed", "trace"]


@dataclass(frozen=True)
class Point:
    """One load. value: requests a second (open; infinity: all at once), requests in flight (closed), or a factor."""

    mode: Mode
    value: float

    @property
    def name(self) -> str:
        """As rate-4, rate-inf, concurrency-16, replay-2."""
        word = {"open": "rate", "closed": "concurrency", "trace": "replay"}[self.mode]
        return f"{word}-{'inf' if math.isinf(self.value) else f'{self.value:g}'}"


def intended_times(point: Point, items: Sequence[Item], seed: int) -> list[float] | None:
    """When each request should be sent, seconds from the point's start; None where answers decide (closed loop).

    Raises: RecipeError for a trace of requests without times.
    """
    if point.mode == "closed":
        return None
    if point.mode == "open":
        return poisson(len(items), point.value, seed)
    known = [item.arrival_s for item in items if item.arrival_s is not None]
    if len(known) < len(items):
        raise RecipeError("this workload has no arrival times to replay: use sharegpt or azure, or --rate")
    return [(at - known[0]) / point.value for at in known]


def poisson(count: int, rate: float, seed: int) -> list[float]:
    """Arrival times of `count` requests, seconds, the first at once; all at 0 for an infinite rate."""
    if math.isinf(rate):
        return [0.0] * count
    rng = random.Random(seed)
    gaps = [0.0, *(rng.expovariate(rate) for _ in range(count - 1))]
    return list(itertools.accumulate(gaps))

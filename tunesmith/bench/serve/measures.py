"""What the records of one point say.

All latencies count from when a request should have been sent (`intended_s`), so that a client that was late, or a
server that made requests queue, hides nothing (coordinated omission).

    ttft_s    to the first chunk with content: text, reasoning or a tool call. The chunk with the role does not count.
    tpot_s    (last content - first content) / (output tokens - 1): of each request with two tokens or more
    itl_s     from one content chunk to the next, over all requests. A chunk may hold several tokens (speculation) and
              two chunks may come in one packet (a wait of 0): `tokens_per_chunk` says how far that goes
    e2e_s     to the end of the stream

Percentiles are nearest-rank: a value that a request really had, nothing between two of them. With fewer than 100
values p99 is the largest. They are of the requests that were answered to the end; those that were not are counted
in `errors`, and miss every objective.

    duration_s        from the first intended arrival to the end of the last answer: the tail in which load falls off
                      is inside, as it is in `vllm bench serve`
    goodput           answers that met all objectives, per second of duration_s
    good_ratio        the same over all requests that were sent
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.bench.serve.record import Record
from tunesmith.errors import RecipeError, nearest

PERCENTILES = (50, 90, 95, 99)
OBJECTIVES = ("ttft", "tpot", "e2e")
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
LATE_LOOP_S = 0.02
BUSY_RATIO = 0.8


@dataclass(frozen=True)
class Objective:
    """A latency that a request must not exceed, seconds."""

    name: str
    limit_s: float


def parse_slo(text: str) -> tuple[Objective, ...]:
    """The objectives of "ttft:200ms,tpot:50ms". Raises: RecipeError."""
    return tuple(_objective(part.strip()) for part in text.split(",") if part.strip())


def _objective(text: str) -> Objective:
    name, _, limit = text.partition(":")
    if name not in OBJECTIVES:
        raise RecipeError(f"--slo knows {', '.join(OBJECTIVES)}, got {name!r}{nearest(name, OBJECTIVES)}")
    unit = next((unit for unit in _UNITS if limit.endswith(unit) and _is_number(limit.removesuffix(unit))), None)
    if unit is None:
        raise RecipeError(f"--slo is NAME:LIMIT with us, ms or s, as ttft:200ms,tpot:50ms; got {text!r}")
    return Objective(name, float(limit.removesuffix(unit)) * _UNITS[unit])


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and float(text) > 0
    except ValueError:
        return False


@dataclass(frozen=True)
class ClientLoad:
    """How busy the client was. cpu_ratio: of one core, in the busiest process; loop_late_s: p99 of how late a timer of
    10 ms fired; send_late_s: p99 of how late requests left."""

    cpu_ratio: float
    loop_late_s: float
    send_late_s: float
    processes: int = 1

    @property
    def saturated(self) -> str | None:
        """Why the client may have been the limit; None where it was not."""
        if self.cpu_ratio >= BUSY_RATIO:
            return f"the client used {self.cpu_ratio * 100:.0f} % of its core: add --client-processes"
        if self.loop_late_s >= LATE_LOOP_S:
            return f"the client's timers were {self.loop_late_s * 1e3:.0f} ms late at p99: give it a core of its own"
        return None


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The nearest-rank percentile of unsorted values, in their unit; None of none."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def spread(values: Iterable[float]) -> dict[str, float | int | None]:
    """count, mean, p50, p90, p95, p99 and max of values, in their unit."""
    known = list(values)
    found: dict[str, float | int | None] = {"count": len(known), "mean": sum(known) / len(known) if known else None}
    return {**found, **{f"p{p}": percentile(known, p) for p in PERCENTILES}, "max": max(known, default=None)}


def meets(record: Record, objectives: Sequence[Objective]) -> bool:
    """Whether an answer came to its end within every objective; of one token, TPOT asks nothing."""
    reads: dict[str, Callable[[Record], float | None]] = {
        "ttft": lambda r: r.ttft_s,
        "tpot": lambda r: r.tpot_s,
        "e2e": lambda r: r.e2e_s,
    }
    found = [(reads[objective.name](record), objective.limit_s) for objective in objectives]
    return record.is_ok and all(value is None or value <= limit for value, limit in found)


def summarise(records: Sequence[Record], objectives: Sequence[Objective] = ()) -> dict[str, Any]:
    """A point in numbers: latencies by the page's head, rates, errors by their text, goodput."""
    done = [record for record in records if record.is_ok]
    duration_s = max((record.ended_s for record in records), default=0.0)
    outputs, prompts = sum(r.output_tokens for r in done), sum(r.prompt_tokens or 0 for r in done)
    chunks = sum(len(record.contents_s) for record in done)
    good = sum(meets(record, objectives) for record in records)

    def per_s(amount: float) -> float | None:
        return amount / duration_s if duration_s else None

    return {
        "requests": len(records),
        "completed": len(done),
        "errors": dict(Counter(record.error for record in records if record.error is not None).most_common(20)),
        "statuses": {str(code): n for code, n in Counter(record.status for record in records).items()},
        "duration_s": duration_s,
        "last_arrival_s": max((record.intended_s for record in records), default=0.0),
        "prompt_tokens": prompts,
        "cached_tokens": sum(record.cached_tokens or 0 for record in done),
        "output_tokens": outputs,
        "tokens_counted_by": "usage" if all(record.is_counted for record in done) else "content chunks",
        "answers_whole": sum(record.is_whole for record in done),
        "tokens_per_chunk": outputs / chunks if chunks else None,
        "requests_per_s": per_s(len(done)),
        "output_tokens_per_s": per_s(outputs),
        "total_tokens_per_s": per_s(outputs + prompts),
        "ttft_s": spread(r.ttft_s for r in done if r.ttft_s is not None),
        "tpot_s": spread(r.tpot_s for r in done if r.tpot_s is not None),
        "itl_s": spread(wait for record in done for wait in record.itl_s),
        "e2e_s": spread(record.e2e_s for record in done),
        "goodput": {
            "objectives": {objective.name: objective.limit_s for objective in objectives},
            "requests_per_s": per_s(good) if objectives else None,
            "good_ratio": good / len(records) if objectives and records else None,
        },
        "max_in_flight": most_at_once(records),
    }


def most_at_once(records: Sequence[Record]) -> int:
    """The most requests that were sent and not yet ended at one moment."""
    events = sorted([(r.sent_s, 1) for r in records] + [(r.ended_s, -1) for r in records])
    most = now = 0
    for _, change in events:
        now += change
        most = max(most, now)
    return most

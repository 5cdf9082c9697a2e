"""Ten times the load that a server sustains, for a minute: it says no quickly, and works as much as at its best.

    python tests/long/overload_campaign.py --seconds 60 --out benchmarks/results/serve-overload-2026-01-01

First the peak: as many requests in flight as the engine takes at once. Then ten times that rate, arriving on their own
(Poisson). The server has one core and the client another, where there are two. Checks:
    memory      of the server and its engine: the last quarter of the minute against the second, within 5 %
    rejections  429 with Retry-After, p99 below 100 ms; as the client sees them, so the connection is inside
    goodput     output tokens a second of answers that came to their end within the minute, at least 90 % of the peak's
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from served import MODEL, MemoryWatch, campaign_server, has_taskset, pin, server_process, stats, wait_until_idle

from tunesmith.bench.serve.arrivals import poisson
from tunesmith.bench.serve.client import Ask
from tunesmith.bench.serve.load import Sent, Share, run_load
from tunesmith.bench.serve.measures import percentile
from tunesmith.bench.serve.record import Record
from tunesmith.bench.serve.workload import Item, Workload, make_requests
from tunesmith.rundir.environment import environment_fingerprint
from tunesmith.rundir.io import write_json_atomic

SEQUENCES, WAITING = 16, 32
TIMES, MEMORY_RATIO, REJECT_S, GOODPUT_RATIO = 10, 0.05, 0.1, 0.9
IDS = 4096


def _items(count: int, seed: int) -> tuple[Item, ...]:
    workload = Workload(count=count, prompt_tokens=(16, 64), output_tokens=(16, 48), num_ids=IDS, seed=seed)
    return make_requests(workload).items


def _peak(ask: Ask, count: int) -> dict[str, float]:
    """Requests and output tokens a second of `count` requests, as many in flight as the engine takes; the first fifth
    of the time is left out, and so is the end, where fewer are left to run."""
    sent = run_load(ask, Share(_items(count, 1), tuple(range(count)), None, SEQUENCES), time.monotonic())
    ends = sorted(record.ended_s for record in sent.records)
    return _rates(sent.records, 0.2 * ends[-1], ends[-SEQUENCES] if count > 2 * SEQUENCES else ends[-1])


def _rates(records: Sequence[Record], begin_s: float, end_s: float) -> dict[str, float]:
    done = [record for record in records if record.is_ok]
    last = min(end_s, max((record.ended_s for record in done), default=end_s))
    inside = [record for record in done if begin_s <= record.ended_s <= last]
    span = max(last - begin_s, 1e-9)
    return {
        "requests_per_s": len(inside) / span,
        "output_tokens_per_s": sum(record.output_tokens for record in inside) / span,
    }


def _overload(ask: Ask, rate: float, seconds: float) -> Sent:
    times = [at for at in poisson(int(rate * seconds * 1.2) + 10, rate, 3) if at <= seconds]
    items = _items(min(len(times), 2000), 2)
    many = tuple(items[i % len(items)] for i in range(len(times)))
    return run_load(ask, Share(many, tuple(range(len(times))), tuple(times)), time.monotonic() + 0.2)


def run(seconds: float) -> dict[str, Any]:
    """The whole campaign. Returns: the result as plain data."""
    cores = sorted(os.sched_getaffinity(0))
    own, theirs = (cores[0], cores[1]) if len(cores) > 1 and has_taskset() else (None, None)
    arguments = ("--max-num-seqs", str(SEQUENCES), "--max-waiting", str(WAITING))
    with tempfile.TemporaryDirectory() as folder, campaign_server(Path(folder), arguments, theirs) as target:
        pin(own)
        ask = Ask(target.url, MODEL, timeout_s=120.0)
        rough = _peak(ask, 4 * SEQUENCES)["requests_per_s"]  # also takes what memory any use takes
        peak = _peak(ask, 3 * SEQUENCES + int(rough * seconds / 3))
        rate = TIMES * peak["requests_per_s"]
        with MemoryWatch(server_process(target)) as memory:
            sent = _overload(ask, rate, seconds)
        after = wait_until_idle(target)
        restarts = stats(target)["restarts"]
    result = _judge(sent, memory, peak, rate, seconds)
    return {
        "schema": "tunesmith.overload",
        "schema_version": 1,
        "server": f"tunesmith serve {MODEL} --debug {' '.join(arguments)}",
        "cores": {"client": own, "server": theirs},
        "load_average": os.getloadavg()[0],
        **result,
        "pages_used_after": after["engine"]["pages_used"],
        "engine_restarts": restarts,
        "passed": all(result["checks"].values()) and not after["engine"]["pages_used"] and not restarts,
        "environment": environment_fingerprint(),
    }


def _judge(sent: Sent, memory: MemoryWatch, peak: dict[str, float], rate: float, seconds: float) -> dict[str, Any]:
    rejected = [record for record in sent.records if record.status == 429]
    other = Counter(record.error for record in sent.records if record.error is not None and record.status != 429)
    took = [record.ended_s - record.sent_s for record in rejected]
    p99 = percentile(took, 99)
    goodput = _rates(sent.records, 0.1 * seconds, seconds)
    early, late = memory.mean_between(seconds / 4, seconds / 2), memory.mean_between(seconds * 3 / 4, seconds)
    growth = late / early - 1 if early else 0.0
    ratio = goodput["output_tokens_per_s"] / peak["output_tokens_per_s"]
    return {
        "seconds": seconds,
        "peak": peak,
        "offered_requests_per_s": rate,
        "requests": len(sent.records),
        "completed": sum(record.is_ok for record in sent.records),
        "rejected": len(rejected),
        "rejected_s": {"p50": percentile(took, 50), "p99": p99, "max": max(took, default=None)},
        "other_errors": dict(other.most_common(10)),
        "goodput": goodput,
        "goodput_ratio": ratio,
        "memory_bytes": {"second_quarter": early, "last_quarter": late, "growth_ratio": growth},
        "client": {"cpu_ratio": sent.cpu_s / sent.wall_s, "loop_late_s": sent.loop_late_s},
        "checks": {
            "memory": growth <= MEMORY_RATIO,
            "rejections": p99 is not None and p99 < REJECT_S,
            "goodput": ratio >= GOODPUT_RATIO,
            "nothing_else": not other,
        },
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, required=True, help="a folder for overload.json")
    arguments = parser.parse_args()
    result = run(arguments.seconds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(arguments.out / "overload.json", result)
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=1))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())

"""One point spread over processes, for servers that answer faster than one core can read.

A shard reads its share as a line of JSON on stdin and says "ready"; when all are, each reads the same moment of the
machine's monotonic clock to start at. Every request that has ended is a line of JSON on stdout, the last line says how
busy the process was.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tunesmith.bench.serve.client import Ask
from tunesmith.bench.serve.load import Sent, Share, Tell, run_load, unheard
from tunesmith.bench.serve.measures import ClientLoad, percentile
from tunesmith.bench.serve.record import Record
from tunesmith.bench.serve.workload import Item
from tunesmith.errors import TunesmithError

MODULE = "tunesmith.bench.serve.shards"
START_S = 0.2


def divide(items: Sequence[Item], times_s: Sequence[float] | None, concurrency: int, processes: int) -> list[Share]:
    """The shares of some processes, request after request to each in turn; no more processes than are of use."""
    most = len(items) if times_s is not None else min(len(items), concurrency)
    count = max(1, min(processes, most))
    shares = []
    for rank in range(count):
        indices = tuple(range(rank, len(items), count))
        times = None if times_s is None else tuple(times_s[i] for i in indices)
        in_flight = concurrency // count + (rank < concurrency % count)
        shares.append(Share(tuple(items[i] for i in indices), indices, times, in_flight))
    return shares


def run_shares(ask: Ask, shares: Sequence[Share], tell: Tell = unheard) -> tuple[list[Record], ClientLoad]:
    """Send all shares at the same time. Raises: TunesmithError where a shard's process failed."""
    alone = len(shares) == 1
    began = time.monotonic() + START_S
    sent = [run_load(ask, shares[0], began, tell)] if alone else _run_processes(ask, shares, tell)
    records = sorted((record for one in sent for record in one.records), key=lambda record: record.index)
    load = ClientLoad(
        cpu_ratio=max(one.cpu_s / one.wall_s if one.wall_s else 0.0 for one in sent),
        loop_late_s=max(one.loop_late_s for one in sent),
        send_late_s=percentile([record.sent_s - record.intended_s for record in records], 99) or 0.0,
        processes=len(sent),
    )
    return records, load


def _run_processes(ask: Ask, shares: Sequence[Share], tell: Tell) -> list[Sent]:
    command = [sys.executable, "-m", MODULE]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in shares]
    try:
        for process, share in zip(processes, shares, strict=True):
            _tell(process, json.dumps({"ask": ask.plain(), "share": asdict(share)}))
        for process in processes:
            _hear(process)
        began = time.monotonic() + START_S
        for process in processes:
            _tell(process, json.dumps(began))
        return _listen(processes, tell)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _hear(process: subprocess.Popen[str]) -> None:
    """Wait until a shard is ready. Raises: TunesmithError when it has ended instead."""
    assert process.stdout is not None
    if not process.stdout.readline():
        raise TunesmithError("a process of the client could not start: see its traceback above")


def _listen(processes: Sequence[subprocess.Popen[str]], tell: Tell) -> list[Sent]:
    """What all shards say, read at the same time, since one whose pipe is full stands still.

    Raises: TunesmithError for a shard that failed.
    """
    said: list[list[dict[str, Any]]] = [[] for _ in processes]

    def read(process: subprocess.Popen[str], lines: list[dict[str, Any]]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            found = json.loads(line)
            lines.append(found)
            if "index" in found:
                tell(Record(**found))

    # Daemons: where this waits in vain and is stopped, the caller ends the processes, and with them the reading.
    readers = [threading.Thread(target=read, args=pair, daemon=True) for pair in zip(processes, said, strict=True)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    for process in processes:
        if process.wait():
            raise TunesmithError(
                f"a process of the client ended with code {process.returncode}: see its traceback above"
            )
    return [Sent(records=[Record(**record) for record in lines[:-1]], **lines[-1]) for lines in said]


def share_of(mapping: dict[str, Any]) -> Share:
    """The share that plain data describes."""
    times = mapping["times_s"]
    return Share(
        items=tuple(Item.of(item) for item in mapping["items"]),
        indices=tuple(mapping["indices"]),
        times_s=None if times is None else tuple(times),
        concurrency=mapping["concurrency"],
    )


def main() -> None:
    """A shard's process."""
    job = json.loads(sys.stdin.readline())
    ask, share = Ask.of(job["ask"]), share_of(job["share"])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sent = run_load(ask, share, json.loads(sys.stdin.readline()), _say)
    _write({"cpu_s": sent.cpu_s, "wall_s": sent.wall_s, "loop_late_s": sent.loop_late_s})


def _say(record: Record) -> None:
    _write(record.plain())


def _write(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

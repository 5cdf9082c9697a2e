"""A server for the campaigns: started, asked for its own numbers, its memory watched, and ended."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tunesmith.bench.serve.target import Target, serve_command, started

MODEL = "builtin:tiny"


@contextlib.contextmanager
def campaign_server(folder: Path, arguments: Sequence[str] = (), core: int | None = None) -> Iterator[Target]:
    """`tunesmith serve builtin:tiny` with its debug routes and its count of pages after every abort.

    Args: core: the one core that it may use, with everything it starts; None: all.
    """
    command = serve_command(MODEL, ("--debug", *arguments))
    if core is not None:
        command = ["taskset", "-c", str(core), *command]
    log = folder / "server.log"
    with started(command, log=log, timeout_s=180) as target:
        yield target


def get_json(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a GET answers, or a POST of `body`."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.load(answer))


def stats(target: Target) -> dict[str, Any]:
    """The engine's and the queue's numbers, as they are now."""
    return get_json(f"{target.url}/debug/stats")


def wait_until_idle(target: Target, timeout_s: float = 60.0) -> dict[str, Any]:
    """Wait until nothing runs, waits, or holds a place. Returns: the numbers then, idle or not."""
    until = time.monotonic() + timeout_s
    while True:
        found = stats(target)
        engine = found["engine"]
        if not (engine["num_running"] or engine["num_waiting"] or found["places_taken"]) or time.monotonic() > until:
            return found
        time.sleep(0.2)


def server_process(target: Target) -> psutil.Process:
    """The process that listens at the target's port. Raises: LookupError."""
    port = int(target.url.rpartition(":")[2])
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(conn.laddr and conn.laddr.port == port for conn in child.net_connections("tcp")):
                return child
    raise LookupError(f"no child of this process listens at {port}")


@dataclass
class MemoryWatch:
    """Resident bytes of a process and all it started, over time, in a thread of its own."""

    process: psutil.Process
    period_s: float = 0.5
    samples: list[tuple[float, int]] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> MemoryWatch:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        began = time.monotonic()
        while not self._stop.wait(self.period_s):
            total = 0
            for one in (self.process, *self.process.children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    total += one.memory_info().rss
            self.samples.append((time.monotonic() - began, total))

    def mean_between(self, begin_s: float, end_s: float) -> float:
        """Mean bytes between two times from the start."""
        found = [size for at, size in self.samples if begin_s <= at <= end_s]
        return sum(found) / len(found) if found else 0.0


def pin(core: int | None) -> None:
    """Keep this process to one core."""
    if core is not None:
        os.sched_setaffinity(0, {core})


def has_taskset() -> bool:
    """Whether a process can be started on one core."""
    return subprocess.run(["taskset", "-V"], capture_output=True).returncode == 0

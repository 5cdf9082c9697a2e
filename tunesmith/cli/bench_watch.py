"""What a load says while it runs: one line that changes on a terminal, a plain line now and then where it is piped."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tunesmith.cli import console

if TYPE_CHECKING:
    from rich.status import Status

    from tunesmith.bench.serve.record import Record

TERMINAL_S, PIPED_S = 0.5, 15.0


def progress_line(name: str, total: int, ended: Sequence[Record], elapsed_s: float) -> str:
    """How far a load is: requests done of all, the median TTFT and time per token so far, failures, seconds."""
    from tunesmith.bench.serve.measures import percentile
    from tunesmith.units import format_seconds

    done = [record for record in ended if record.is_ok]
    parts = [f"{len(ended)} of {total} requests"]
    for label, values in (
        ("TTFT", [record.ttft_s for record in done]),
        ("TPOT", [record.tpot_s for record in done]),
    ):
        middle = percentile([value for value in values if value is not None], 50)
        parts += [f"{label} p50 {format_seconds(middle)}"] if middle is not None else []
    failed = len(ended) - len(done)
    parts += [f"{failed} failed"] if failed else []
    return f"{name}: {', '.join(parts)} ({elapsed_s:.0f} s)"


class LoadProgress:
    """A thread that says how far the load is that runs now. Its lines cost the client some microseconds each."""

    def __init__(self) -> None:
        self._load: tuple[str, int, list[Record], float] | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._status: Status | None = None

    def begin(self, name: str, total: int, ended: list[Record]) -> None:
        """A load begins; `ended` grows as its requests end."""
        with self._lock:
            self._load = (name, total, ended, time.monotonic())

    def end(self) -> None:
        """The load is over: nothing more is said of it."""
        with self._lock:
            self._load = None
            if self._status is not None:
                self._status.stop()
                self._status = None

    def say(self) -> None:
        """Say where the load is; nothing where none runs."""
        with self._lock:
            if self._load is None:
                return
            name, total, ended, began = self._load
            line = progress_line(name, total, list(ended), time.monotonic() - began)
            if not console.err.is_terminal:
                console.err.print(line, markup=False)
            elif self._status is None:
                self._status = console.err.status(line)
                self._status.start()
            else:
                self._status.update(line)

    @contextlib.contextmanager
    def running(self) -> Iterator[LoadProgress]:
        """While this is open, loads are told of."""
        every_s = TERMINAL_S if console.err.is_terminal else PIPED_S
        thread = threading.Thread(target=self._work, args=(every_s,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._over.set()
            thread.join()
            self.end()

    def _work(self, every_s: float) -> None:
        while not self._over.wait(every_s):
            self.say()

"""Where the time goes between a command and its first step: seconds by part, for the run directory and --debug."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunesmith.units import format_seconds

_TOLD_S = 0.01


class StartUp:
    """A stopwatch with parts, of the main thread; `beside` is for what other threads do meanwhile.

    Parts follow one another, or lie within one another, where the outer one counts without the inner ones. What lies
    between two is "before" the second one, or "other" where it is next to nothing.

    Args: age_s: how long the process has run already, and so_far: the part that was.
    """

    def __init__(self, age_s: float = 0.0, so_far: str = "imports") -> None:
        self._edge = time.perf_counter()
        self._began = self._edge - age_s
        self._parts: dict[str, float] = {}
        self._aside: dict[str, float] = {}
        self._lock = threading.Lock()
        self._total_s: float | None = None
        self._last: tuple[str, float] | None = None
        self._inner_s: list[float] = []
        if age_s:
            self._parts[so_far] = age_s

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done inside counts as `name`, again and again; nothing once start-up is over."""
        began = self._enter(name)
        self._inner_s.append(0.0)
        try:
            yield
        finally:
            self._edge = time.perf_counter()
            took_s, inner_s = self._edge - began, self._inner_s.pop()
            self._add(self._parts, name, took_s - inner_s)
            if self._inner_s:
                self._inner_s[-1] += took_s

    def _enter(self, name: str) -> float:
        """Now; the time since the part before is named where it is worth it, and no outer part counts it."""
        now = time.perf_counter()
        gap_s = now - self._edge
        if not self._inner_s and gap_s >= _TOLD_S:
            self._add(self._parts, f"before {name}", gap_s)
        return now

    @contextmanager
    def beside(self, name: str) -> Iterator[None]:
        """The same for another thread: it is listed, and not part of the sum."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._add(self._aside, name, time.perf_counter() - began)

    def begin_last(self, name: str) -> None:
        """From here to `finish` counts as `name`."""
        self._last = (name, self._enter(name))

    def _add(self, where: dict[str, float], name: str, seconds: float) -> None:
        with self._lock:
            if self._total_s is None:
                where[name] = where.get(name, 0.0) + seconds

    @property
    def is_over(self) -> bool:
        """Whether the first step is done."""
        return self._total_s is not None

    def finish(self) -> dict[str, float]:
        """The first step is done: seconds by part, the rest as "other", "total", and what ran aside."""
        if self._last is not None:
            name, began = self._last
            self._add(self._parts, name, time.perf_counter() - began)
        with self._lock:
            if self._total_s is None:
                self._total_s = time.perf_counter() - self._began
            other = self._total_s - sum(self._parts.values())
            aside = {f"{name} (aside)": seconds for name, seconds in self._aside.items()}
            found = {**self._parts, "other": max(0.0, other), **aside, "total": self._total_s}
        return {name: round(seconds, 3) for name, seconds in found.items()}


def describe(seconds: dict[str, float]) -> str:
    """The account in one line, without what took no time."""
    told = {name: value for name, value in seconds.items() if name != "total" and value >= _TOLD_S}
    parts = ", ".join(f"{name} {format_seconds(value)}" for name, value in told.items())
    return f"start-up: first step after {format_seconds(seconds['total'])}: {parts}"


def process_age_s() -> float:
    """Seconds since this process began, to a hundredth; 0.0 where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        up_s = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
        return max(0.0, up_s - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return 0.0

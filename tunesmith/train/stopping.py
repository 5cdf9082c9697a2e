"""Signals that end a run politely: the step in progress is finished, the state saved, the exit code is the signal's."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def exit_code(received: signal.Signals | None) -> int:
    """128 + the signal's number, as shells count: 143 for SIGTERM, 130 for Ctrl-C; 0 for none."""
    return 0 if received is None else 128 + int(received)


@contextlib.contextmanager
def sigterm_exits() -> Iterator[None]:
    """SIGTERM raises SystemExit(143), so that what is open is closed: while loading there is nothing to save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(exit_code(signal.Signals(number)))

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopSignals:
    """While this context is open, SIGTERM and the first Ctrl-C only set `received`; a second Ctrl-C stops at once.

    Outside the main thread nothing is changed: Python delivers signals to the main thread only.
    """

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.received: signal.Signals | None = None
        self._announce = announce
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        with contextlib.suppress(RuntimeError):  # Python does not write in the middle of its own writing
            self._announce(f"{self.received.name}: finishing this step, then saving{again}")

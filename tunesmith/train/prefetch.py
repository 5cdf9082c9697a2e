"""Batches are made in the background while the device works."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from tunesmith.errors import TrainingError

Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """Calls make(start), make(start + 1), ... make(stop - 1) in a thread, at most `depth` ahead of `take`."""

    def __init__(self, make: Callable[[int], Item], start: int, stop: int, depth: int = 2) -> None:
        self._make = make
        self._ready: queue.Queue[Item | BaseException] = queue.Queue(maxsize=depth)
        self._closing = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(start, stop), name="prefetch", daemon=True)
        self._thread.start()

    def take(self) -> tuple[Item, float]:
        """The next item, and the seconds it was waited for. Raises: what making it raised."""
        if self._failure is not None:
            raise self._failure
        began = time.perf_counter()
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        return item, time.perf_counter() - began

    def close(self) -> None:
        """Stop the thread; what it had made is dropped."""
        self._closing.set()
        while self._thread.is_alive():
            self._drain()
            self._thread.join(timeout=0.01)

    def _drain(self) -> None:
        try:
            while True:
                self._ready.get_nowait()
        except queue.Empty:
            return

    def _work(self, start: int, stop: int) -> None:
        for number in range(start, stop):
            try:
                item: Item | BaseException = self._make(number)
            except BaseException as error:
                item = error
            if not self._put(item) or isinstance(item, BaseException):
                return
        self._put(TrainingError(f"there is no data after step {stop}: the run is {stop} steps long"))

    def _put(self, item: Item | BaseException) -> bool:
        while not self._closing.is_set():
            try:
                self._ready.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

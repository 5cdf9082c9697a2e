"""What the engine has said to one HTTP request and nobody has read yet."""

from __future__ import annotations

import asyncio
import time

from tunesmith.serve.messages import Delta


class Mailbox:
    """New text of one or several answers of a request. A reader that lags finds several steps joined into one."""

    def __init__(self, num_answers: int, *, is_structured: bool = False) -> None:
        self.num_open = num_answers
        self.is_structured = is_structured
        self._last_s: dict[int, float] = {}
        self._waiting: dict[int, Delta] = {}
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, index: int, delta: Delta) -> float | None:
        """Add to an answer. Returns: seconds a token since what came before; None for the first."""
        now = time.perf_counter()
        before = self._last_s.get(index)
        self._last_s[index] = now
        if delta.end is not None:
            self.num_open -= 1
        kept = self._waiting.get(index)
        if kept is None:
            self._waiting[index] = delta
        else:
            kept.add(delta)
        self._wake()
        return None if before is None else (now - before) / max(1, len(delta.token_ids))

    def fail(self, error: Exception) -> None:
        """Have the reader raise; what it has not read is dropped."""
        if self._error is None:
            self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def take(self) -> dict[int, Delta]:
        """What came since the last call, by answer; empty when all answers have ended. One reader at a time."""
        while True:
            if self._error is not None:
                raise self._error
            if self._waiting:
                taken, self._waiting = self._waiting, {}
                return taken
            if not self.num_open:
                return {}
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None

"""What the engine has said to one HTTP request and nobody has read yet."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.serve.messages import Delta, Row, delta_of


@dataclass
class Choices:
    """The answers to one prompt: how many were asked for, of how many tokens at most, and how far they are.

    num_open: answers that have not ended; most_tokens: of those that have, the longest's; is_cut: one was aborted.
    """

    num: int
    max_tokens: int | None
    num_open: int
    most_tokens: int = 0
    is_cut: bool = False


class Mailbox:
    """New text of one or several answers of a request. A reader that lags finds several steps joined into one.

    choices: of each answer, those to its prompt. is_structured: an answer is held to a grammar.
    last_s: when each answer was last heard of.
    """

    def __init__(self, choices: Sequence[Choices], *, is_structured: bool = False) -> None:
        self.choices = choices
        self.num_open = len(choices)
        self.is_structured = is_structured
        self.last_s = [0.0] * self.num_open
        self._waiting: dict[int, Row] = {}
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None

    def put(self, index: int, row: Row) -> None:
        """Add a row of `messages.Outputs` to an answer. Called for every token of every request: little is done."""
        if row[4] is not None:
            self.num_open -= 1
        kept = self._waiting.get(index)
        if kept is None:
            self._waiting[index] = row
        else:
            kept[1] += row[1]
            kept[2] += row[2]
            if row[3] is not None:
                kept[3] = (kept[3] or []) + row[3]
            kept[4] = row[4]
        reader = self._reader
        if reader is not None:
            self._reader = None
            if not reader.done():
                reader.set_result(None)

    def fail(self, error: Exception) -> None:
        """Have the reader raise; what it has not read is dropped."""
        if self._error is None:
            self._error = error
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def take(self) -> dict[int, Delta]:
        """What came since the last call, by answer; empty when all answers have ended. One reader at a time."""
        while True:
            if self._error is not None:
                raise self._error
            if self._waiting:
                taken, self._waiting = self._waiting, {}
                return {index: delta_of(row) for index, row in taken.items()}
            if not self.num_open:
                return {}
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader

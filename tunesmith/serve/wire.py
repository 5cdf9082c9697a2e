"""The HTTP process's end of the socket to the engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from tunesmith.serve.messages import Frames, Message

log = logging.getLogger(__name__)


class EngineWire(asyncio.Protocol):
    """Frames in; `closed` is done when the other side is gone, `error` says what could not be read."""

    def __init__(self, take: Callable[[Message], None]) -> None:
        self.take = take
        self.frames = Frames()
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.error: Exception | None = None
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for message in self.frames.feed(data):
                self.take(message)
        except Exception as error:
            log.exception("a message of the engine can't be taken")
            self.error = error
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

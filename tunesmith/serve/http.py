"""uvicorn, without its hold on signals (`run` decides when it stops), and with a limit on how requests begin."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_S = 30.0
HEAD_BYTES = 2**16
# Of a body that nobody wants, since its request has been answered.
UNWANTED_BYTES = 2**20
_LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class HttpServer(uvicorn.Server):
    """HTTP/1.1 around an ASGI application."""

    def __init__(self, app: Any, *, grace_s: float, keep_alive_s: int, head_s: float = HEAD_S) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=hurried(AutoHTTPProtocol, head_s),
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_keep_alive=keep_alive_s,
                timeout_graceful_shutdown=max(1, round(grace_s)),
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Signals are the caller's."""
        yield


def hurried(protocol: Any, head_s: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, for which a request's head must arrive in `head_s` seconds, and within 64 KiB.

    uvicorn itself waits for a first request, and for the end of a head, as long as the client likes.
    """

    class Hurried(protocol):  # type: ignore[misc]
        """One connection."""

        head_timer: asyncio.TimerHandle | None = None
        head_bytes = 0

        def connection_made(self, transport: Any) -> None:
            """The first head is waited for."""
            super().connection_made(transport)
            self.head_timer = self.loop.call_later(head_s, self.be_late)

        def connection_lost(self, exc: Exception | None) -> None:
            """Nothing is waited for."""
            self.stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """A part of a head, or of what follows it."""
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self.stop_timer()
                return
            self.head_bytes += len(data)
            if self.head_bytes > (UNWANTED_BYTES if self.cycle is not None and self.cycle.more_body else HEAD_BYTES):
                self.end(_LONG if self.cycle is None else b"")
            elif self.head_timer is None:
                self.head_timer = self.loop.call_later(head_s, self.be_late)

        def stop_timer(self) -> None:
            """The head is there."""
            if self.head_timer is not None:
                self.head_timer.cancel()
            self.head_timer, self.head_bytes = None, 0

        def be_late(self) -> None:
            """Time is over: whoever has said something is told."""
            self.end(_LATE if self.head_bytes else b"")

        def end(self, answer: bytes) -> None:
            """Close the connection."""
            self.stop_timer()
            if not self.transport.is_closing():
                self.transport.write(answer)
                self.transport.close()

    return Hurried

"""Server-sent events, and work that ends when its client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tunesmith.serve.errors import ApiError, dumps, error_body, to_bytes

log = logging.getLogger(__name__)
Result = TypeVar("Result")
DONE = "data: [DONE]\n\n"
DIRECT_SEND = "direct_send"
SLOW_READER_S = 5.0
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ClientGoneError(Exception):
    """The client closed its connection."""


def event(content: Any) -> str:
    """One data object."""
    return f"data: {dumps(content)}\n\n"


class EventStream(Response):
    """Sends what a generator of events yields.

    The headers wait for the first event, so what goes wrong before it has a status of its own; what goes wrong later
    is a data object with OpenAI's error. However it ends, the generator is closed and `on_close` is called.

    Args:
        deadline_s: the request's, on the event loop's clock: soon after it the connection of a client that reads too
            slowly is ended, so that nobody holds a place for ever.
    """

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        *,
        headers: dict[str, str],
        on_close: Callable[[], None],
        deadline_s: float,
    ) -> None:
        super().__init__(headers=headers)
        self.events = events
        self.on_close = on_close
        self.deadline_s = deadline_s
        self._extra = [(name.lower().encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it, or stop when the client goes."""
        task = asyncio.create_task(self._send(scope, receive, send))
        gone = asyncio.create_task(_gone(receive))
        try:
            left_s = self.deadline_s + SLOW_READER_S - asyncio.get_running_loop().time()
            await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED, timeout=max(0.0, left_s))
            if task.done():
                await task
            elif not gone.done():
                log.warning("a client did not read its stream in time: its connection is ended")
        finally:
            for other in (task, gone):
                other.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)
            self.on_close()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self.events):
            try:
                first = await anext(self.events)
            except ApiError as error:
                error.headers.update({name.decode(): value.decode() for name, value in self._extra})
                await error.response()(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS, *self._extra]})
            send = scope.get("state", {}).get(DIRECT_SEND, send)
            await _send_text(send, first)
            try:
                async for text in self.events:
                    await _send_text(send, text)
            except ApiError as error:
                await _send_text(send, event(error.body()) + DONE)
            except Exception as error:
                log.exception("a stream failed")
                await _send_text(send, event(error_body(500, f"internal error: {type(error).__name__}")) + DONE)
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def named_event(name: str, content: Any) -> str:
    """One event of the Responses interface."""
    return f"event: {name}\ndata: {dumps(content)}\n\n"


async def _send_text(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": to_bytes(text), "more_body": True})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The work's result; when the client goes first the work is cancelled. Raises: ClientGoneError then."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return await task
    finally:
        for other in (task, gone):
            other.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)

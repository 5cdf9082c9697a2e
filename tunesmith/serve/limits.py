"""What a request may take: places in the queue, a share of them by key, bytes, depth of JSON, and time."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter, deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith.serve.errors import ApiError

TIMEOUT_HEADER = "X-Request-Timeout"
_BODY_S = 60.0
# A request that is turned away is still read when it is this short, so that its connection can be used again.
_SHORT_BODY_BYTES = 64 * 2**10
# A text that never ends reaches to the end of the body: one that could fail there would be looked for again from
# every quote in it, and 40 kB of quotes took seven seconds.
_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', flags=re.DOTALL)
_MAX_BRACKETS = 2**20
_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


class Admission:
    """Counts the answers that run or wait, in all and by key. What doesn't fit is turned away at once.

    Args:
        max_places: answers that may run and wait together.
        max_by_key: how many of these one key may hold.
    """

    def __init__(self, max_places: int, max_by_key: int) -> None:
        self.max_places = max_places
        self.max_by_key = max_by_key
        self.by_key: Counter[str] = Counter()
        self.num_taken = 0
        self.num_rejected = 0
        self._left: deque[float] = deque(maxlen=64)

    def enter(self, key: str, num_answers: int) -> Ticket:
        """Take places. Raises: ApiError: 429 when there are too few left; 400 where there will never be enough."""
        most = min(self.max_places, self.max_by_key)
        if num_answers > most:
            raise ApiError(400, f"the request asks for {num_answers} answers; at most {most} are allowed", param="n")
        if self.num_taken + num_answers > self.max_places:
            raise self._turn_away(f"the server is full: {self.num_taken} answers run or wait for their turn")
        if self.by_key[key] + num_answers > self.max_by_key:
            raise self._turn_away(f"your key has {self.by_key[key]} answers running or waiting, its whole share")
        return Ticket(self, key, num_answers)

    def check(self, key: str) -> None:
        """The same for one more answer, before anything of the request is read. Raises: ApiError (429)."""
        if self.num_taken >= self.max_places or self.by_key[key] >= self.max_by_key:
            raise self._turn_away(f"the server is full: {self.num_taken} answers run or wait for their turn")

    def _turn_away(self, message: str) -> ApiError:
        self.num_rejected += 1
        return ApiError(429, f"{message}; try again later", code="queue_full", retry_after_s=self.retry_after_s())

    def retry_after_s(self) -> float:
        """About when a tenth of the places will have become free, from the pace at which answers ended lately."""
        if len(self._left) < 2:
            return 1.0
        pace_s = (self._left[-1] - self._left[0]) / (len(self._left) - 1)
        return min(60.0, max(1.0, pace_s * self.max_places / 10))

    def leave(self, key: str, num_answers: int) -> None:
        """Give places back."""
        self.num_taken -= num_answers
        self.by_key[key] -= num_answers
        if self.by_key[key] <= 0:
            del self.by_key[key]
        self._left.append(time.monotonic())


class Ticket:
    """Places of one request, given back once."""

    def __init__(self, admission: Admission, key: str, num_answers: int) -> None:
        self.admission, self.key, self.num_answers = admission, key, num_answers
        admission.num_taken += num_answers
        admission.by_key[key] += num_answers

    def leave(self) -> None:
        """Give them back."""
        if self.num_answers:
            self.admission.leave(self.key, self.num_answers)
            self.num_answers = 0

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.leave()


def deadline_s(headers: Any, asked_s: float | None, longest_s: float, param: str = "timeout") -> float:
    """When the request's time is over, on the event loop's clock: its header's or field's seconds, or the server's.

    Raises: ApiError (400) for a header that is no number of seconds.
    """
    header = headers.get(TIMEOUT_HEADER)
    wanted = longest_s if asked_s is None else min(asked_s, longest_s)
    if header is not None:
        try:
            seconds = float(header)
        except ValueError:
            seconds = -1.0
        if not seconds > 0:
            raise ApiError(400, f"{TIMEOUT_HEADER} must be seconds above 0, got {header[:32]!r}", param=TIMEOUT_HEADER)
        wanted = min(wanted, seconds)
    return asyncio.get_running_loop().time() + wanted


def is_too_deep(body: bytes, depth: int) -> bool:
    """Whether JSON is nested deeper than `depth` (or has brackets that don't match, or a million); it is not parsed."""
    if body.count(b"[") + body.count(b"{") <= depth:
        return False
    brackets = _STRINGS.sub(b"", body).translate(_ONE_KIND, _NOT_BRACKETS)
    if len(brackets) > _MAX_BRACKETS:
        return True
    for _ in range(depth):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


class Guard:
    """ASGI middleware before anything is parsed: headers, bytes, depth, a full queue."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        max_header_bytes: int,
        max_depth: int,
        precheck: Callable[[Scope], None],
    ) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.max_header_bytes = max_header_bytes
        self.max_depth = max_depth
        self.precheck = precheck

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on with the body read, or answer the error."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            length = self._check_headers(scope)
            try:
                self.precheck(scope)
            except ApiError as error:
                if 0 < length <= _SHORT_BODY_BYTES:
                    await self._body(receive)
                    error.headers["Connection"] = "keep-alive"
                raise
            body = await self._body(receive) if scope["method"] in ("POST", "PUT", "PATCH", "DELETE") else None
            if body and scope["method"] == "POST":
                _check_type(scope)
        except ApiError as error:
            # What is left of the body is not read: the connection ends here.
            error.headers.setdefault("Connection", "close")
            await error.response()(scope, receive, send)
            return
        except _GoneError:
            return
        await self.app(scope, receive if body is None else _replay(body, receive), send)

    def _check_headers(self, scope: Scope) -> int:
        """The body's length, 0 where it isn't said. Raises: ApiError (413, 415, 431)."""
        size = sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope.get("raw_path") or b"")
        if size > self.max_header_bytes:
            raise ApiError(431, f"the headers have {size} bytes; at most {self.max_header_bytes} are allowed")
        coding = next((value for name, value in scope["headers"] if name == b"content-encoding"), b"identity")
        if coding.strip().lower() != b"identity":
            shown = coding[:64].decode("latin-1")
            raise ApiError(415, f"bodies are read as they are, not compressed: leave out Content-Encoding: {shown}")
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        num_bytes = int(length) if length.isdigit() and len(length) < 19 else 0
        if num_bytes > self.max_body_bytes:
            raise self._too_long(num_bytes)
        return num_bytes

    def _too_long(self, size: int) -> ApiError:
        return ApiError(
            413, f"the body has {size} bytes or more; at most {self.max_body_bytes} are allowed", code="body_too_large"
        )

    async def _body(self, receive: Receive) -> bytes:
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(_BODY_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _GoneError
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.max_body_bytes:
                        raise self._too_long(size)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive in {_BODY_S:.0f} s") from None
        body = b"".join(parts)
        if is_too_deep(body, self.max_depth):
            raise ApiError(
                400,
                f"the body is no JSON, or nested deeper than {self.max_depth} levels, or of too many lists",
                code="bad_json",
            )
        return body


def _check_type(scope: Scope) -> None:
    """Raises: ApiError (415) for a body that doesn't say it is JSON."""
    kind = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    name = kind.partition(b";")[0].strip().lower()
    if not name.startswith(b"application/") or not name.endswith(b"json"):
        shown = kind[:64].decode("latin-1") or "none"
        raise ApiError(415, f"the body must be JSON, with the header Content-Type: application/json; got {shown}")


class _GoneError(Exception):
    """The client left before its request was whole."""


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body first."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed

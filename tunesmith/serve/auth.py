"""API keys: read once, compared in constant time, asked for on every route but those of health."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from tunesmith.errors import RequestError
from tunesmith.serve.errors import ApiError

ENVIRONMENT = "TUNESMITH_API_KEYS"
OPEN_PATHS = frozenset({"/health", "/ready"})
ANYBODY = "anybody"


def read_keys(given: Sequence[str], file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The keys of the command line, of a file (one a line, # begins a comment) and of TUNESMITH_API_KEYS (by commas).

    Raises: RequestError for a file that can't be read or has none, and for keys that no header can carry.
    """
    keys = [*given, *environment.get(ENVIRONMENT, "").split(",")]
    if file is not None:
        try:
            lines = file.expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"the file of API keys {file} can't be read: {error}") from None
        found = [line.partition("#")[0].strip() for line in lines]
        if not any(found):
            raise RequestError(f"the file of API keys {file} has none: write one key a line")
        keys += found
    keys = [key.strip() for key in keys if key.strip()]
    for key in keys:
        if not key.isascii() or not key.isprintable() or " " in key:
            raise RequestError("an API key may hold printable ASCII characters only, and no spaces")
    return tuple(dict.fromkeys(keys))


def check_address(host: str, uds: str | None, keys: Sequence[str], allow_unauthenticated: bool) -> None:
    """Raises: RequestError where a server without keys could be reached from other machines."""
    if uds is not None or keys or allow_unauthenticated or is_loopback(host):
        return
    raise RequestError(
        f"--host {host} can be reached from other machines and there are no API keys: give --api-key-file FILE (or "
        f"{ENVIRONMENT}), keep --host 127.0.0.1, or say --allow-unauthenticated"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Auth:
    """The gate, as ASGI middleware. Tells the routes who came, as `scope["state"]["key"]`.

    Args:
        origins: the only web pages, beside this machine's own, that may call a server without keys; None: any may try.
            A page of another site can give itself this machine's address (DNS rebinding), and browsers then take the
            server for the page's own; only the header Origin tells.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], origins: Collection[str] | None = None) -> None:
        self.app = app
        self.origins = origins
        self.digests = [hashlib.sha256(key.encode("ascii")).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 401."""
        if scope["type"] != "http" or not self.digests or scope["path"] in OPEN_PATHS:
            scope.setdefault("state", {})["key"] = ANYBODY
            if scope["type"] == "http" and (origin := self.foreign_origin(scope)) is not None:
                text = (
                    f"web pages of {origin[:200]} may not call this server: name it with --cors-origin, or set API keys"
                )
                await ApiError(403, text, code="origin_not_allowed").response()(scope, receive, send)
                return
            await self.app(scope, receive, send)
            return
        key = self.who(scope["headers"])
        if key is None:
            sent = _token(scope["headers"])
            error = ApiError(
                401,
                "this server wants an API key: send the header Authorization: Bearer KEY"
                if sent is None
                else "this API key is not one of the server's: look for a mistake in the header Authorization",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.response()(scope, receive, send)
            return
        scope.setdefault("state", {})["key"] = key
        await self.app(scope, receive, send)

    def foreign_origin(self, scope: Scope) -> str | None:
        """The page that sent a request and may not, where the server has no keys to tell by."""
        if self.digests or self.origins is None or scope["path"] in OPEN_PATHS:
            return None
        found = next((value for name, value in scope["headers"] if name == b"origin"), None)
        origin = None if found is None else found.decode("latin-1")
        if origin is None or origin in self.origins or "*" in self.origins:
            return None
        try:
            host = urlsplit(origin).hostname
        except ValueError:
            host = None
        return None if host is not None and is_loopback(host) else origin

    def who(self, headers: Sequence[tuple[bytes, bytes]]) -> str | None:
        """The key's short name (no secret), or None. Every key is compared, whichever fits."""
        token = _token(headers)
        digest = hashlib.sha256(b"" if token is None else token).digest()
        fits = [hmac.compare_digest(digest, known) for known in self.digests]
        if token is None or not any(fits):
            return None
        return self.digests[fits.index(True)].hex()[:8]


def _token(headers: Sequence[tuple[bytes, bytes]]) -> bytes | None:
    """What was sent as a key."""
    return next((_bearer(value) for name, value in headers if name == b"authorization"), None)


def _bearer(value: bytes) -> bytes | None:
    scheme, _, token = value.strip().partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" and token.strip() else None


def key_of(request: Any) -> str:
    """Who sent the request."""
    return str(request.scope.get("state", {}).get("key", ANYBODY))

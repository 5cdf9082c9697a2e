"""uvicorn, without its hold on signals: `run` decides when it stops."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import uvicorn


class HttpServer(uvicorn.Server):
    """HTTP/1.1 around an ASGI application."""

    def __init__(self, app: Any, *, grace_s: float, keep_alive_s: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
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

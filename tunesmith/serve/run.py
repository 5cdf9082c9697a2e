"""Runs the server: the engine process first, the socket, then HTTP until a signal; running requests are finished."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tunesmith.errors import RequestError
from tunesmith.serve.client import AsyncEngine
from tunesmith.serve.errors import ApiError, engine_down
from tunesmith.serve.options import EngineOptions, ServerOptions
from tunesmith.serve.process import EngineProcess

log = logging.getLogger(__name__)
Tell = Callable[[dict[str, Any]], None]
BACKLOG = 2048
_KEEP_ALIVE_S = 65
# What uvicorn waits beyond our own grace, in which requests that were ended say so.
_LAST_WORDS_S = 5
_POLL_S = 0.05


@dataclass(frozen=True)
class Stopped:
    """Why a server ended: the signal, whether requests were cut off, and whether any were waited for."""

    signal: int | None
    has_cut: bool
    has_waited: bool = False


def run_server(options: ServerOptions, engine: EngineOptions, tell: Tell) -> Stopped:
    """Serve until SIGTERM or SIGINT.

    Args: `tell`: is told, once, of a server that is ready: its address, what is loaded, how long that took.
    Raises: RequestError when the address can't be had; EngineStartError when the model can't be loaded.
    """
    listening = listen(options)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_serve(options, engine, listening, tell))
    finally:
        listening.close()
        if options.uds is not None:
            Path(options.uds).unlink(missing_ok=True)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's, where it is installed (with httptools, which uvicorn finds itself, streams cost about half)."""
    try:
        import uvloop  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    return cast("Callable[[], asyncio.AbstractEventLoop]", uvloop.new_event_loop)


def listen(options: ServerOptions) -> socket.socket:
    """The socket. Raises: RequestError when it can't be had."""
    try:
        if options.uds is not None:
            return _listen_uds(Path(options.uds))
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((options.host, options.port), family=family, backlog=BACKLOG)
    except OSError as error:
        place = options.uds or f"{options.host}:{options.port}"
        reason = os.strerror(error.errno) if error.errno else error.strerror
        raise RequestError(
            f"the server can't listen on {place}: {reason}; is another one running there? Choose "
            f"another place with --port, --host or --uds"
        ) from None


def _listen_uds(path: Path) -> socket.socket:
    if path.is_socket():
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(ConnectionRefusedError):
            probe.connect(str(path))
            raise OSError(None, "another server answers there")
        path.unlink()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen(BACKLOG)
    return listening


async def _serve(
    options: ServerOptions,
    engine_options: EngineOptions,
    listening: socket.socket,
    tell: Callable[[dict[str, Any]], None],
) -> Stopped:
    began_s = time.perf_counter()
    engine = AsyncEngine(EngineProcess, engine_options, stall_s=options.stall_s, hang_s=options.hang_s)
    engine.start()
    await asyncio.sleep(0)  # the engine's process begins to load before anything else is imported here
    from tunesmith.serve.app import build_app
    from tunesmith.serve.http import HttpServer
    from tunesmith.serve.state import load_adapters, load_text, make_server

    server = make_server(options, engine)
    http = HttpServer(build_app(server), grace_s=options.grace_s + _LAST_WORDS_S, keep_alive_s=_KEEP_ALIVE_S)
    stop = Stop(server, http)
    serving = asyncio.create_task(http.serve(sockets=[listening]))

    async def load() -> None:
        await asyncio.gather(engine.loaded(), load_text(server))
        server.settle()
        try:
            await load_adapters(server)
        except ApiError as error:
            raise RequestError(error.message) from None

    loading = asyncio.create_task(load())
    try:
        await asyncio.wait([serving, loading], return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            tell({"address": listening.getsockname(), "facts": engine.facts, "start_s": time.perf_counter() - began_s})
        await serving
    finally:
        loading.cancel()
        http.should_exit = True
        await engine.stop()
        await asyncio.gather(serving, loading, return_exceptions=True)
        stop.remove()
    return Stopped(stop.number, stop.has_cut, stop.has_waited)


class Stop:
    """What signals do: the first ends the server when its requests are answered, the second at once."""

    def __init__(self, server: Any, http: Any) -> None:
        self.server, self.http = server, http
        self.number: int | None = None
        self.cut_at_s = 0.0
        self.has_cut = self.has_waited = False
        self.loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self.begin, int(number))

    def remove(self) -> None:
        """Give the signals back."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.remove_signal_handler(number)

    def begin(self, number: int) -> None:
        """A signal came."""
        if self.number is not None:
            self.http.force_exit = self.http.should_exit = True
            self._cut()
            return
        self.number = number
        self.server.is_draining = True
        grace_s = self.server.options.grace_s
        if num := self.server.admission.num_taken:
            answers = "1 answer" if num == 1 else f"{num} answers"
            log.warning("finishing %s, at most %g s; Ctrl-C or SIGTERM once more ends at once", answers, grace_s)
            self.has_waited = True
        self.cut_at_s = self.loop.time() + grace_s
        self._wait()

    def _wait(self) -> None:
        """Until the last answer is given or time is over the server listens on, so that /health can say no."""
        left_s = self.cut_at_s - self.loop.time()
        if self.server.admission.num_taken and left_s > 0 and not self.http.force_exit:
            self.loop.call_later(min(_POLL_S, left_s), self._wait)
            return
        self.http.config.timeout_graceful_shutdown = max(1, round(max(0.0, left_s) + _LAST_WORDS_S))
        self.http.should_exit = True
        if left_s <= 0:
            self._cut()
        else:
            self.loop.call_later(left_s, self._cut)

    def _cut(self) -> None:
        self.has_cut = self.has_cut or self.server.engine.is_busy
        self.server.engine.fail_all(engine_down("the server is shutting down"))

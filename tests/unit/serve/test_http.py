"""Connections that begin a request and do not end it: each holds a file, so none may last."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from tunesmith.serve.http import HEAD_BYTES, UNWANTED_BYTES, HttpServer

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter


async def answer(scope: Any, receive: Any, send: Any) -> None:
    """Answers at once, without reading a body."""
    if scope["path"] == "/slow":
        await asyncio.sleep(0.4)
    headers = [(b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok", "more_body": False})


def with_server(test: Callable[[Callable[[], Awaitable[tuple[Reader, Writer]]]], Awaitable[None]]) -> None:
    async def main() -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        server = HttpServer(answer, grace_s=1, keep_alive_s=5, head_s=0.2)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            async with asyncio.timeout(30):
                await test(lambda: asyncio.open_connection("127.0.0.1", listening.getsockname()[1]))
        finally:
            server.should_exit = True
            await serving
            listening.close()

    asyncio.run(main())


async def finish(reader: Reader, writer: Writer) -> bytes:
    """All that comes until the server closes."""
    try:
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def test_who_says_nothing_or_never_ends_a_head_is_let_go() -> None:
    async def test(connect: Callable[[], Awaitable[tuple[Reader, Writer]]]) -> None:
        assert await finish(*await connect()) == b""
        reader, writer = await connect()
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX-")
        assert (await finish(reader, writer)).startswith(b"HTTP/1.1 408 ")
        reader, writer = await connect()
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 ")
        writer.write(b"G")
        assert b"408" in await finish(reader, writer)

    with_server(test)


def test_a_head_without_end_and_a_body_that_nobody_wants_are_cut_off() -> None:
    async def test(connect: Callable[[], Awaitable[tuple[Reader, Writer]]]) -> None:
        reader, writer = await connect()
        writer.write(b"GET / HTTP/1.1\r\n" + b"X-Long: " + b"x" * (HEAD_BYTES + 2**18))
        ended = await finish(reader, writer)
        assert not ended or ended.startswith((b"HTTP/1.1 4",))
        reader, writer = await connect()
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
        await reader.readuntil(b"ok")
        for _ in range(3 * UNWANTED_BYTES // 2**16):
            writer.write(b"x" * 2**16)
            await asyncio.sleep(0)
        await finish(reader, writer)

    with_server(test)


def test_an_answer_that_takes_long_is_waited_for() -> None:
    async def test(connect: Callable[[], Awaitable[tuple[Reader, Writer]]]) -> None:
        reader, writer = await connect()
        for _ in range(2):
            writer.write(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200 ")
        writer.close()

    with_server(test)

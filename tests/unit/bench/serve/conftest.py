"""A server whose delays are known: what is measured can be compared with what it did."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest


@dataclass
class KnownServer:
    """Answers on /v1/completions and /v1/chat/completions: `first_s` until the first content, `gap_s` between chunks.

    at_once: requests that are answered at one time, the rest waits (None: all). fail: a status for every request;
    fail_inside: an error object as the second event. vocab_size: what the list of models says; highest_id: prompts with
    higher ids are refused. tokens_per_chunk: what usage says beside the chunks.
    """

    first_s: float = 0.0
    gap_s: float = 0.0
    at_once: int | None = None
    fail: int | None = None
    fail_inside: bool = False
    tokens_per_chunk: int = 1
    says_usage: bool = True
    max_model_len: int = 4000
    vocab_size: int | None = 9001
    highest_id: int = 10**9
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    gate: asyncio.Semaphore | None = None
    said_s: list[float] = field(default_factory=list)
    """When each chunk with content was written, by time.monotonic."""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, request after request."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                fields = dict(line.split(": ", 1) for line in head.lower().split("\r\n")[1:] if ": " in line)
                body = await reader.readexactly(int(fields.get("content-length", 0)))
                self.keys.append(fields.get("authorization"))
                await self._respond(head.split()[1], body, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _respond(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if path == "/v1/models":
            self._plain(
                writer,
                200,
                {"data": [{"id": "known", "max_model_len": self.max_model_len, "vocab_size": self.vocab_size}]},
            )
        elif path == "/version":
            self._plain(writer, 200, {"version": "1.2.3"})
        elif self.fail is not None:
            self._plain(writer, self.fail, {"error": {"message": "too many requests", "code": self.fail}})
        else:
            request = json.loads(body)
            if max(request.get("prompt", [0])) > self.highest_id:
                self._plain(writer, 400, {"error": {"message": f"no token id above {self.highest_id}"}})
                await writer.drain()
                return
            self.bodies.append(request)
            if self.at_once is not None and self.gate is None:
                self.gate = asyncio.Semaphore(self.at_once)
            if self.gate is None:
                await self._stream(writer, request, path.startswith("/v1/chat"))
            else:
                async with self.gate:
                    await self._stream(writer, request, path.startswith("/v1/chat"))
        await writer.drain()

    def _plain(self, writer: asyncio.StreamWriter, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)

    async def _stream(self, writer: asyncio.StreamWriter, request: dict[str, Any], is_chat: bool) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        if is_chat:
            self._event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        chunks = request["max_tokens"] // self.tokens_per_chunk
        for number in range(chunks):
            await asyncio.sleep(self.gap_s if number else self.first_s)
            if self.fail_inside and number == 1:
                self._event(writer, {"error": {"message": "the engine died"}})
            delta = {"delta": {"content": " é"}} if is_chat else {"text": " é"}
            self.said_s.append(time.monotonic())
            self._event(writer, {"choices": [{"index": 0, **delta, "finish_reason": None}]})
        end: dict[str, Any] = {"delta": {}} if is_chat else {"text": ""}
        self._event(writer, {"choices": [{"index": 0, **end, "finish_reason": "length"}]})
        if self.says_usage:
            usage = {"prompt_tokens": 7, "completion_tokens": request["max_tokens"]}
            self._event(writer, {"choices": [], "usage": usage})
        self._event(writer, None)
        writer.write(b"0\r\n\r\n")

    def _event(self, writer: asyncio.StreamWriter, event: dict[str, Any] | None) -> None:
        line = b"data: " + (b"[DONE]" if event is None else json.dumps(event).encode()) + b"\n\n"
        # Cut in two: a client may not count on whole events.
        for part in (line[:9], line[9:]):
            writer.write(b"%x\r\n%s\r\n" % (len(part), part))


@pytest.fixture
def known_server() -> Iterator[KnownServer]:
    """A KnownServer on a free port; set its fields before asking it."""
    server = KnownServer()
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    connections: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            await server.answer(reader, writer)
        finally:
            connections.discard(task)
            writer.transport.abort()

    async def main(stop: asyncio.Event) -> None:
        listening = await asyncio.start_server(accept, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        ready.set()
        await stop.wait()
        listening.close()
        for task in list(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await asyncio.sleep(0.01)  # aborted transports close their sockets on the loop's next turn

    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(main(stop)))
    thread.start()
    ready.wait(10)
    yield server
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()

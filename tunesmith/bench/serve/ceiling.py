"""What the client itself can do: chunks a second of one core, read from a server that does nothing else.

`python -m tunesmith.bench.serve.ceiling` prints one line of JSON. The server is a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from typing import Any

from tunesmith.bench.serve.client import Ask
from tunesmith.bench.serve.load import Share, loop_name, run_load
from tunesmith.bench.serve.workload import Item

STREAMS, CHUNKS, GAP_S = 64, 400, 0.01
_EVENT = {
    "id": "cmpl-0123456789abcdef",
    "object": "text_completion",
    "created": 0,
    "model": "none",
    "choices": [{"index": 0, "text": " token", "logprobs": None, "finish_reason": None}],
}


def _framed(event: bytes) -> bytes:
    line = b"data: " + event + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(line), line)


def _events(chunks: int) -> tuple[bytes, bytes]:
    """A chunk of text, and the end of a stream with its usage, framed as chunked HTTP."""
    choice = {**_EVENT["choices"][0], "text": "", "finish_reason": "length"}  # type: ignore[index]
    usage = {**_EVENT, "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": chunks}}
    last = [json.dumps({**_EVENT, "choices": [choice]}).encode(), json.dumps(usage).encode(), b"[DONE]"]
    return _framed(json.dumps(_EVENT).encode()), b"".join(map(_framed, last)) + b"0\r\n\r\n"


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, chunks: int, gap_s: float) -> None:
    piece, end = _events(chunks)
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            for _ in range(chunks):
                writer.write(piece)
                await asyncio.sleep(gap_s)
            writer.write(end)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def serve(chunks: int, gap_s: float) -> None:
    """Serve on a free port, which is printed, until the process is ended."""
    server = await asyncio.start_server(lambda r, w: _answer(r, w, chunks, gap_s), "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


def measure(streams: int = STREAMS, chunks: int = CHUNKS, gap_s: float = GAP_S) -> dict[str, Any]:
    """Read `streams` streams of `chunks` chunks. Returns: chunks_per_s (wall), chunks_per_core_s (of CPU seconds)."""
    command = [sys.executable, "-m", "tunesmith.bench.serve.ceiling", "serve", str(chunks), str(gap_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            ask = Ask(f"http://127.0.0.1:{int(server.stdout.readline())}", "none")
            share = Share((Item((1,), chunks),) * streams, tuple(range(streams)), (0.0,) * streams)
            sent = run_load(ask, share, time.monotonic())
        finally:
            server.terminate()
    read = sum(len(record.contents_s) for record in sent.records if record.is_ok)
    return {
        "streams": streams,
        "chunks": read,
        "loop": loop_name(),
        "chunks_per_s": read / sent.wall_s,
        "chunks_per_core_s": read / sent.cpu_s,
    }


def main(arguments: list[str]) -> None:
    """`serve CHUNKS GAP_S` is the server; without arguments the ceiling is measured."""
    if arguments[:1] == ["serve"]:
        asyncio.run(serve(int(arguments[1]), float(arguments[2])))
    else:
        sys.stdout.write(json.dumps(measure()) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

"""`tunesmith chat --server` against a server of a few lines that speaks OpenAI's interface and knows no /tokenize."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class Handler(BaseHTTPRequestHandler):
    """Says the last message back, in two pieces."""

    asked: list[Any] = []  # noqa: RUF012 (what the test looks at)
    starting = 0
    """Requests that are still answered with 503."""

    def do_GET(self) -> None:
        if type(self).starting:
            type(self).starting -= 1
            self._json(503, {"error": {"message": "the engine is starting"}})
            return
        self._json(200, {"data": [{"id": "echo"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self._json(404, {"error": {"message": "no such route"}})
            return
        self.asked.append(body)
        text = body["messages"][-1]["content"]
        if text == "too long":
            self._json(400, {"error": {"message": "the prompt is too long"}})
            return
        deltas = [{"role": "assistant"}, {"content": text[:2]}, {"content": text[2:]}]
        chunks: list[Any] = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
        chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        chunks.append({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write("".join(f"data: {json.dumps(c)}\n\n" for c in chunks).encode() + b"data: [DONE]\n\n")

    def _json(self, status: int, content: Any) -> None:
        raw = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        """Silent."""


@pytest.fixture
def url() -> Iterator[str]:
    Handler.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_one_question(url: str, tunesmith_cli: Any) -> None:
    done = tunesmith_cli(
        "chat",
        "--server",
        f"{url}/v1",
        "--prompt",
        "你好 there",
        "--system",
        "Be kind.",
        "--seed",
        "3",
        "--json",
        check=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["answers"][0]["text"] == "你好 there" and result["answers"][0]["prompt_tokens"] == 7
    # All came in one piece: 8,055 tokens/s were read off the microseconds between its lines.
    assert result["answers"][0]["timings"]["tpot_s"] is None
    assert [m["role"] for m in result["messages"]] == ["system", "user", "assistant"]
    assert (
        Handler.asked[0]["model"] == "echo" and Handler.asked[0]["seed"] == 3 and "temperature" not in Handler.asked[0]
    )
    refused = tunesmith_cli("chat", "--server", url, "--prompt", "too long")
    assert refused.returncode == 2 and "the prompt is too long" in refused.stderr
    other = tunesmith_cli("chat", "--server", url, "nobody")
    assert other.returncode == 2 and "echo" in other.stderr


def test_a_server_that_is_starting_is_waited_for(url: str, tunesmith_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "starting", 2)
    done = tunesmith_cli("chat", "--server", url, "--prompt", "hello")
    assert done.returncode == 0, done.stderr
    assert "is not ready (the engine is starting): waiting for it" in done.stderr
    assert "hello" in done.stdout

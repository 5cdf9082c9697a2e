"""The HTTP client: one streamed request to any OpenAI server, and when each piece of its answer came.

aiohttp, because a client must not be the limit of what it measures. Chunks a second of one core, read from a trivial
SSE server, with every chunk parsed (`python -m tunesmith.bench.serve.ceiling` measures it on your machine): aiohttp
22,000, with uvloop 46,000; httpx 8,000 (a Xeon with AVX-512, 64 streams that give a chunk every 10 ms).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

from tunesmith.bench.serve.record import ERROR_CHARACTERS, Record, in_words
from tunesmith.bench.serve.sse import DONE, EventReader
from tunesmith.bench.serve.workload import Item


@dataclass(frozen=True)
class Ask:
    """What is asked of whom, beside the prompt.

    url: of the server, without /v1. ignore_eos: answers have exactly as many tokens as asked for (an extension that
    vLLM, SGLang and tunesmith share). timeout_s: of one request, from when it is sent. extra: more fields of the body.
    """

    url: str
    model: str
    api_key: str | None = None
    temperature: float | None = 0.6
    ignore_eos: bool = True
    timeout_s: float = 600.0
    extra: tuple[tuple[str, Any], ...] = ()

    def plain(self) -> dict[str, Any]:
        """The fields as plain data, with the key: only ever for a pipe to a process of ours."""
        return {**self.__dict__, "extra": [list(pair) for pair in self.extra]}

    @classmethod
    def of(cls, mapping: Mapping[str, Any]) -> Ask:
        """The ask that plain data describes."""
        return cls(**{**mapping, "extra": tuple((key, value) for key, value in mapping["extra"])})

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}

    def body(self, item: Item) -> tuple[str, dict[str, Any]]:
        """The route, and the JSON that is posted to it: token ids are completed, a text is a user's message."""
        common: dict[str, Any] = {
            "model": self.model,
            "max_tokens": item.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({} if self.temperature is None else {"temperature": self.temperature}),
            **({"ignore_eos": True} if self.ignore_eos else {}),
            **dict(self.extra),
        }
        if isinstance(item.prompt, str):
            return "/v1/chat/completions", {**common, "messages": [{"role": "user", "content": item.prompt}]}
        return "/v1/completions", {**common, "prompt": list(item.prompt)}


class StreamError(Exception):
    """The answer is none: an error's status, an error inside the stream, or a stream that ended early."""


def open_session() -> aiohttp.ClientSession:
    """A session that never makes a request wait for a free connection, and keeps those it has."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60), timeout=aiohttp.ClientTimeout(total=None)
    )


async def send(
    session: aiohttp.ClientSession, ask: Ask, item: Item, *, index: int, began: float, intended_s: float | None = None
) -> Record:
    """Send one request and read its whole answer. Never raises for what the server does: that is in the record.

    Args: began: the point's start on time.monotonic(). intended_s: None: now, as a closed loop sends.
    """
    sent_s = time.monotonic() - began
    record = Record(index, sent_s if intended_s is None else intended_s, sent_s)
    try:
        async with asyncio.timeout(ask.timeout_s):
            await _exchange(session, ask, item, record, began)
    except TimeoutError:
        record.error = f"no end within {ask.timeout_s:g} s"
    except StreamError as error:
        record.error = str(error)[:ERROR_CHARACTERS]
    except (aiohttp.ClientError, OSError) as error:
        record.error = " ".join(f"{type(error).__name__}: {error}".split())[:ERROR_CHARACTERS]
    record.ended_s = time.monotonic() - began
    return record


async def _exchange(session: aiohttp.ClientSession, ask: Ask, item: Item, record: Record, began: float) -> None:
    route, body = ask.body(item)
    async with session.post(ask.url + route, json=body, headers=ask.headers) as response:
        record.status = response.status
        if response.status != 200:
            raise StreamError(in_words(response.status, await response.text()))
        reader, is_done = EventReader(), False
        async for data in response.content.iter_any():
            now = time.monotonic() - began
            for payload in reader.feed(data):
                if payload == DONE:
                    is_done = True
                else:
                    take(payload, record, now)
        _check_end(record, is_done)


def take(payload: bytes, record: Record, now_s: float) -> None:
    """Note one event of a stream. Raises: StreamError for an error inside it, or what is no JSON."""
    try:
        event = json.loads(payload)
    except ValueError:
        raise StreamError(f"an event is no JSON: {payload[:80]!r}") from None
    if error := event.get("error"):
        raise StreamError(f"inside the stream: {error.get('message', error) if isinstance(error, dict) else error}")
    for choice in event.get("choices") or ():
        if has_content(choice):
            record.contents_s.append(now_s)
        record.finish_reason = choice.get("finish_reason") or record.finish_reason
    if usage := event.get("usage"):
        record.prompt_tokens = usage.get("prompt_tokens")
        record.output_tokens = usage.get("completion_tokens") or 0
        record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")


def has_content(choice: Mapping[str, Any]) -> bool:
    """Whether a chunk's choice brings something that a reader sees, and not a role or an end alone."""
    delta = choice.get("delta")
    if isinstance(delta, dict):
        return any(delta.get(key) for key in ("content", "reasoning_content", "reasoning", "tool_calls", "refusal"))
    return bool(choice.get("text"))


def _check_end(record: Record, is_done: bool) -> None:
    if not record.output_tokens:
        record.output_tokens, record.is_counted = len(record.contents_s), False
    if not is_done and record.finish_reason is None:
        raise StreamError("the stream ended without a finish reason or [DONE]")
    if not record.contents_s:
        raise StreamError("the answer has no content: tokens may have made no text")

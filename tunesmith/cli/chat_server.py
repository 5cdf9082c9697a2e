"""`tunesmith chat --server URL`: the same conversation with a model that an OpenAI-compatible server holds."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import httpx

from tunesmith.cli.console import err
from tunesmith.engine.conversation import Conversation, Mode
from tunesmith.engine.request import Completion, SamplingParams, Timings
from tunesmith.errors import RequestError

KEY_VARIABLE = "TUNESMITH_API_KEY"
_CONNECT_S = 5.0
# How long a server that says 503 is waited for, and between two looks.
_START_S, _LOOK_S = 600.0, 0.5
# What a server that doesn't say its context's length is taken to have.
_UNKNOWN_CONTEXT = 10**9
_FIELDS = ("temperature", "top_p", "top_k", "repetition_penalty")


def converse(url: str, model: str | None, asked: Mapping[str, Any]) -> tuple[Conversation, str, bool]:
    """A conversation with the server's model, what to call it, and whether it stands without history by itself.

    Args: `asked`: the options of `tunesmith chat`; what is not said there is left to the server.
    Raises: RequestError when the server can't be reached, or refuses; for an option that goes with loading a model.
    """
    for name in ("adapter", "quantize", "max_model_len"):
        if asked[name] is not None:
            raise RequestError(f"--{name.replace('_', '-')} goes with a model that is loaded here, not with --server")
    neutral = {"top_k": 0, "repetition_penalty": 1.0}
    given = {name: asked[name] for name in _FIELDS if asked[name] not in (None, neutral.get(name))}
    remote = RemoteModel(url, model, given)
    mode: Mode = "complete" if asked["mode"] == "complete" else "chat"
    params = SamplingParams(max_tokens=asked["max_tokens"], seed=asked["seed"])
    alone = remote.single_turns and mode == "chat" and asked["history"] is None
    history = not alone and asked["history"] is not False
    conversation = Conversation(cast(Any, remote), params, asked["system"], mode, history)
    return conversation, f"{remote.model} at {remote.url}", alone


class RemoteModel:
    """What a conversation asks of `LLM`, asked of a server. The connection lasts as long as the process."""

    runner = None

    def __init__(self, url: str, model: str | None, given: Mapping[str, Any]) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get(KEY_VARIABLE) or os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(None, connect=_CONNECT_S)
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout)
        self.given = dict(given)
        cards = _checked(self._once_up("/v1/models")).get("data") or []
        names = [str(card.get("id")) for card in cards]
        if model is not None and model not in names:
            raise RequestError(f"the server {self.url} has no model {model!r}; it has: {', '.join(names) or 'none'}")
        if not names:
            raise RequestError(f"the server {self.url} has no model")
        self.model = model or names[0]
        card = cards[names.index(self.model)]
        # A field of ours: other servers don't say it.
        self.single_turns = card.get("single_turns") is True
        limit = card.get("max_model_len")
        self.max_model_len = limit if isinstance(limit, int) else _UNKNOWN_CONTEXT
        self._counts = True

    def encode(self, text: str) -> list[int]:
        """The ids of a text; none where the server doesn't tell."""
        return self._tokens({"prompt": text})

    def encode_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The ids of a conversation; none where the server doesn't tell."""
        return self._tokens({"messages": list(messages)})

    def _tokens(self, body: dict[str, Any]) -> list[int]:
        if not self._counts:
            return []
        response = self._send("POST", "/tokenize", {"model": self.model, **body})
        if response.status_code == 404:
            self._counts = False
            return []
        return [int(token) for token in _checked(response).get("tokens", [])]

    def stream_chat(self, messages: Sequence[Mapping[str, Any]], params: SamplingParams) -> RemoteStream:
        """The answer as it comes."""
        return self._stream("/v1/chat/completions", {"messages": list(messages)}, params)

    def stream(self, text: str, params: SamplingParams) -> RemoteStream:
        """The text's continuation as it comes."""
        return self._stream("/v1/completions", {"prompt": text}, params)

    def _stream(self, path: str, body: dict[str, Any], params: SamplingParams) -> RemoteStream:
        asked = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}, **self.given, **body}
        asked["max_tokens"] = params.max_tokens
        if params.seed is not None:
            asked["seed"] = params.seed
        return RemoteStream(self, path, asked)

    def _once_up(self, path: str) -> httpx.Response:
        """The answer of a server that may still be starting (503): it is waited for, and that is said."""
        response = self._send("GET", path, None)
        until = time.monotonic() + _START_S
        if response.status_code == 503:
            err.print(
                f"the server {self.url} is not ready ({_reason(_content(response))}): waiting for it; Ctrl-C ends that"
            )
        while response.status_code == 503 and time.monotonic() < until:
            time.sleep(_LOOK_S)
            response = self._send("GET", path, None)
        return response

    def _send(self, method: str, path: str, body: Any) -> httpx.Response:
        try:
            return self.http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise self.unreachable(error) from None
        except httpx.InvalidURL as error:
            raise RequestError(
                f"--server wants an address like http://127.0.0.1:8000, got {self.url!r}: {error}"
            ) from None

    def unreachable(self, error: Exception) -> RequestError:
        """What to say when the connection fails."""
        return RequestError(
            f"the server {self.url} can't be reached ({error}): is it running? Start one with: tunesmith serve MODEL"
        )


class RemoteStream(Iterator[str]):
    """Pieces of an answer. `completion` is there at its end; `close` ends it early."""

    def __init__(self, remote: RemoteModel, path: str, body: dict[str, Any]) -> None:
        self.completion: Completion | None = None
        self.remote = remote
        self.began_s = time.perf_counter()
        self.first_s: float | None = None
        self.text = ""
        self.reason = "abort"
        self.usage: dict[str, Any] = {}
        self.num_chunks = 0
        self.num_arrivals = 0
        self._num_bytes = 0
        self._request = remote.http.build_request("POST", path, json=body)
        try:
            self._response = remote.http.send(self._request, stream=True)
            if self._response.status_code != 200:
                self._response.read()
                _checked(self._response)
        except httpx.HTTPError as error:
            raise remote.unreachable(error) from None
        self._lines = self._response.iter_lines()

    def __next__(self) -> str:
        if self.completion is not None:
            raise StopIteration
        try:
            for line in self._lines:
                if line.startswith("data: ") and (piece := self._take(line[6:])):
                    return piece
        except httpx.HTTPError as error:
            raise self.remote.unreachable(error) from None
        self.close()
        raise StopIteration

    def _take(self, data: str) -> str:
        if data == "[DONE]":
            return ""
        chunk = json.loads(data)
        if "error" in chunk:
            raise RequestError(f"the server ended the answer: {_reason(chunk)}")
        self.usage = chunk.get("usage") or self.usage
        if not chunk.get("choices"):
            return ""
        choice = chunk["choices"][0]
        self.reason = choice.get("finish_reason") or self.reason
        piece = choice.get("text") if "text" in choice else choice.get("delta", {}).get("content")
        if piece:
            self.first_s = self.first_s or time.perf_counter()
            self.num_chunks += 1
            self.num_arrivals += self._response.num_bytes_downloaded > self._num_bytes
            self._num_bytes = self._response.num_bytes_downloaded
            self.text += piece
        return piece or ""

    def close(self) -> None:
        """End the answer here; the server hears of it."""
        if self.completion is not None:
            return
        self._response.close()
        now = time.perf_counter()
        first = self.first_s or now
        num_tokens = int(self.usage.get("completion_tokens", self.num_chunks))
        # What arrived as one has no time between its tokens: 8,055 tokens/s were read off an answer of 64 ms.
        tpot_s = (now - first) / (num_tokens - 1) if num_tokens > 1 and self.num_arrivals > 1 else None
        self.completion = Completion(
            self.text,
            [0] * num_tokens,
            cast(Any, self.reason),
            int(self.usage.get("prompt_tokens", 0)),
            Timings(0.0, first - self.began_s, now - self.began_s, tpot_s),
        )


def _checked(response: httpx.Response) -> dict[str, Any]:
    """The answer's object. Raises: RequestError with what the server says is wrong."""
    content = _content(response)
    if response.status_code == 401:
        if "authorization" in response.request.headers:
            raise RequestError(f"the server doesn't know the API key that was sent: look at {KEY_VARIABLE}")
        raise RequestError(f"the server wants an API key: set {KEY_VARIABLE}")
    if response.status_code >= 400 or not isinstance(content, dict):
        raise RequestError(f"the server answered {response.status_code}: {_reason(content)}")
    return content


def _content(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _reason(content: Any) -> str:
    error = content.get("error") if isinstance(content, dict) else None
    return str(error.get("message")) if isinstance(error, dict) else "not in OpenAI's form"

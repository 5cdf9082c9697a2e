"""A fake engine behind the real worker loop, client and application: everything but the model is what is served."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from functools import cache, wraps
from pathlib import Path
from typing import Any

import httpx

import tunesmith
from tunesmith.engine.config import EngineStats
from tunesmith.engine.request import Completion, SamplingParams, StepOutput, Timings, TokenLogprobs
from tunesmith.engine.text import AnswerText
from tunesmith.errors import RequestError
from tunesmith.serve import messages, worker
from tunesmith.serve.app import build_app
from tunesmith.serve.client import AsyncEngine
from tunesmith.serve.options import EngineOptions, ServerOptions
from tunesmith.serve.state import Server, load_text, make_server
from tunesmith.text.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

MODEL = Path(tunesmith.__file__).parent / "models" / "tiny"
END = 2
SAYS = "The answer is 42, and naïve 你好 too."
LIMIT = 256


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(MODEL)


@dataclass
class Running:
    """A request in the fake engine."""

    prompt: list[int]
    params: SamplingParams
    answer: list[int]
    text: AnswerText
    given: list[int] = field(default_factory=list)


class FakeEngine:
    """Says `says` to everybody, a token a step. Prompts that hold these words go wrong in their own ways."""

    def __init__(self, says: str = SAYS, step_s: float = 0.0) -> None:
        self.says, self.step_s = says, step_s
        self.running: dict[int, Running] = {}
        self.submitted: list[dict[str, Any]] = []
        self.num_steps = self.num_tokens = self.count = 0
        self.hangs = threading.Event()
        self.breaks = False

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def idle(self) -> bool:
        return False

    def submit(self, prompt_ids: list[int], params: SamplingParams, **more: Any) -> int:
        text = tokenizer().decode(prompt_ids)
        if "refuse me" in text:
            raise RequestError("this prompt is refused")
        if "break me" in text:
            raise KeyError("a bug")
        self.count += 1
        self.submitted.append({"prompt": text, "params": params, **more})
        decoder = StreamDecoder(tokenizer(), skip_special=params.skip_special_tokens)
        answer = [*tokenizer().encode(self.says), END]
        self.running[self.count] = Running(list(prompt_ids), params, answer, AnswerText(decoder, params.stop))
        if "fail later" in text:
            self.running[self.count].answer = answer[:3]
        return self.count

    def step(self) -> list[StepOutput]:
        while self.hangs.is_set():
            time.sleep(0.01)
        if self.breaks:
            raise RuntimeError("the step broke")
        time.sleep(self.step_s)
        self.num_steps += 1
        return [self._advance(request_id) for request_id in list(self.running)]

    def _advance(self, request_id: int) -> StepOutput:
        one = self.running[request_id]
        if len(one.given) == len(one.answer):
            return self._end(request_id, "error", "", [], error="the logits are not numbers")
        token = one.answer[len(one.given)]
        one.given.append(token)
        self.num_tokens += 1
        if token == END:
            return self._end(request_id, "stop", "", [token])
        piece = one.text.push(token)
        if one.text.stopped:
            return self._end(request_id, "stop", piece, [token], stop_reason=one.params.stop[0])
        if len(one.given) >= (one.params.max_tokens or LIMIT):
            return self._end(request_id, "length", piece + one.text.finish(), [token])
        return StepOutput(request_id, [token], piece, None, self._logprobs(one, [token]))

    def _end(self, request_id: int, reason: Any, piece: str, new: list[int], **more: Any) -> StepOutput:
        one = self.running.pop(request_id)
        done = Completion(
            one.text.text, one.given, reason, len(one.prompt), Timings(0.001, 0.01, 0.02, 0.001),
            logprobs=self._logprobs(one, one.given), prompt_logprobs=self._prompt_logprobs(one), cached_tokens=1,
            **more,
        )  # fmt: skip
        return StepOutput(request_id, new, piece, done, self._logprobs(one, new))

    def _logprobs(self, one: Running, ids: list[int]) -> list[TokenLogprobs] | None:
        if one.params.logprobs is None:
            return None
        top = tuple((i, -0.5 - i) for i in range(one.params.logprobs))
        return [TokenLogprobs(token, -math.inf if token == END else -0.25, top) for token in ids]

    def _prompt_logprobs(self, one: Running) -> list[TokenLogprobs | None] | None:
        if one.params.prompt_logprobs is None:
            return None
        return [None, *(TokenLogprobs(token, -1.0, ((token, -1.0),)) for token in one.prompt[1:])]

    def abort(self, request_id: int) -> None:
        self.running.pop(request_id, None)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.running), steps=self.num_steps, generation_tokens=self.num_tokens,
            prompt_tokens=self.count, pages_used=len(self.running), pages_total=16,
        )  # fmt: skip


class FakeModel:
    """What `loading.LoadedModel` is for the worker."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.facts = {"max_model_len": LIMIT, "vocab_size": 4096, "embedding_size": 4, "max_num_seqs": 4}
        self.adapters: dict[str, str] = {}

    def text_context(self, prompt_ids: list[int]) -> list[int]:
        return prompt_ids[-2:]

    def embed(self, inputs: list[list[int]], pooling: str) -> Iterator[list[bytes]]:
        import struct

        for ids in inputs:
            yield [struct.pack("<4f", float(len(ids)), 0.5, 0.0, float(pooling == "last"))]

    def load_adapter(self, name: str, path: str, follow: bool) -> Any:
        if not path.startswith("/"):
            raise RequestError(f"there is no adapter {path}")

        def is_loaded() -> bool:
            if path == "/broken":
                raise RequestError("the adapter is broken")
            is_there = name in self.adapters
            self.adapters[name] = path
            return is_there

        return is_loaded

    def unload_adapter(self, name: str) -> None:
        del self.adapters[name]

    def close(self) -> None:
        """There are no other processes."""


class ThreadLink:
    """The worker in a thread of this process. `die` is what SIGKILL is to a process."""

    def __init__(self, fake: FakeEngine, failure: Exception | None = None) -> None:
        self.socket, theirs = socket.socketpair()
        self.fake, self.failure = fake, failure
        self.link = worker.Link(theirs)
        self.code: int | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):
            self.code = worker.serve(self.link, self._load)

    def _load(self, options: EngineOptions, send: Any) -> FakeModel:
        if self.failure is not None:
            raise self.failure
        send(messages.Source({"tokenizer": str(MODEL), "model": str(MODEL), "template_arguments": {}}))
        return FakeModel(self.fake)

    def kill(self) -> None:
        self.fake.hangs.clear()
        with contextlib.suppress(OSError):
            self.link.connection.shutdown(socket.SHUT_RDWR)

    def exit_code(self, timeout_s: float) -> int | None:
        self.thread.join(timeout_s)
        return self.code


@dataclass
class Served:
    """A server with a fake engine."""

    client: httpx.AsyncClient
    server: Server
    fakes: list[FakeEngine]
    links: list[ThreadLink]
    app: Any
    failures: list[Exception]

    @property
    def fake(self) -> FakeEngine:
        return self.fakes[-1]

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.client.post(path, json=body)

    async def chat(self, text: str = "Hi", **body: Any) -> httpx.Response:
        return await self.post("/v1/chat/completions", messages=[{"role": "user", "content": text}], **body)

    async def until(self, condition: Any, timeout_s: float = 30.0) -> None:
        """Wait until something is true."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def served(
    says: str = SAYS, step_s: float = 0.0, failure: Exception | None = None, hang_s: float = 300.0,
    stall_s: float = 60.0, max_num_seqs: int = 4, **options: Any,
) -> AsyncIterator[Served]:  # fmt: skip
    """A server that is ready."""
    fakes: list[FakeEngine] = []
    links: list[ThreadLink] = []
    failures = [] if failure is None else [failure]

    def launch() -> ThreadLink:
        fakes.append(FakeEngine(says, step_s))
        links.append(ThreadLink(fakes[-1], failures[-1] if failures else None))
        return links[-1]

    engine = AsyncEngine(
        launch, EngineOptions("tiny", max_num_seqs=max_num_seqs), stall_s=stall_s, hang_s=hang_s
    )  # fmt: skip
    server = make_server(ServerOptions(("tiny", "other-name"), **options), engine)
    app = build_app(server)
    engine.start()
    try:
        await engine.loaded()
        await load_text(server)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield Served(client, server, fakes, links, app, failures)
    finally:
        await engine.stop()


def in_server(**how: Any) -> Any:
    """Runs an async test inside a server."""

    def decorate(test: Any) -> Any:
        @wraps(test)
        def run() -> None:
            async def main() -> None:
                async with served(**how) as one:
                    await test(one)

            asyncio.run(main())

        del run.__wrapped__  # pytest would look at the async function's arguments
        return run

    return decorate


def data_objects(response: httpx.Response) -> list[Any]:
    """The objects of a stream; the last is "[DONE]" where it ended so."""
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object of an answer, which has OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    return error

"""`tunesmith serve` as programs use it: the real server on builtin:tiny, and openai's own client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

START_S = 60.0
# A greedy answer of the embedded model, and a prompt whose answer is long.
HELLO = [{"role": "user", "content": "Hello!"}]


class Serving:
    """A server in a process of its own."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.log = directory / "server.log"
        command = [sys.executable, "-m", "tunesmith", "serve", "builtin:tiny", "--port", "0", "--json", *options]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        timer = threading.Timer(START_S, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        assert line, self.log.read_text()
        self.ready: dict[str, Any] = json.loads(line)
        self.url = self.ready["url"].removesuffix("/v1")

    def engine(self) -> psutil.Process:
        """The engine's process."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def stop(self) -> int:
        """SIGTERM, and its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()
            self.process.communicate()


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory, kernel_cache: Path) -> Iterator[Serving]:
    """A server as anyone has it: its engine answers by our own C++."""
    environment = {"TUNESMITH_API_KEYS": "secret", "OMP_NUM_THREADS": "1"}
    environment |= {"TUNESMITH_CPU_STEP": "1", "XDG_CACHE_HOME": str(kernel_cache)}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    server = Serving(tmp_path_factory.mktemp("serve"), "--debug", "--shutdown-timeout", "10")
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    yield server
    server.stop()


@pytest.fixture
def client(serving: Serving) -> Iterator[Any]:
    import openai

    with openai.OpenAI(base_url=f"{serving.url}/v1", api_key="secret", max_retries=0) as made:
        yield made


def get(serving: Serving, path: str) -> httpx.Response:
    return httpx.get(f"{serving.url}{path}", headers={"Authorization": "Bearer secret"}, timeout=20)


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come true"
        time.sleep(0.02)


@contextmanager
def asked_all_along(serving: Serving, path: str) -> Iterator[list[httpx.Response]]:
    """What a path answers, asked again and again from before the body: nothing is missed while that stands still."""
    answers, over = [get(serving, path)], threading.Event()

    def ask() -> None:
        while not over.wait(0.02):
            with suppress(httpx.TransportError):
                answers.append(get(serving, path))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield answers
    finally:
        over.set()
        asking.join()


def test_chat_whole_and_streamed_say_the_same(client: Any) -> None:
    whole = client.chat.completions.create(model="builtin:tiny", messages=HELLO, temperature=0)
    assert whole.choices[0].message.content and whole.choices[0].finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    stream = client.chat.completions.create(
        model="builtin:tiny", messages=HELLO, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_async_client_and_many_at_once(serving: Serving) -> None:
    import openai

    async def main() -> set[str]:
        async with openai.AsyncOpenAI(base_url=f"{serving.url}/v1", api_key="secret") as client:

            async def ask() -> str:
                stream = await client.chat.completions.create(model="builtin:tiny", messages=HELLO, stream=True)
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return set(await asyncio.gather(*(ask() for _ in range(8))))

    assert len(asyncio.run(main())) == 1


def test_logprobs_of_the_real_engine(client: Any) -> None:
    answer = client.chat.completions.create(
        model="builtin:tiny", messages=HELLO, logprobs=True, top_logprobs=3, max_completion_tokens=4
    )
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 4 and all(len(entry.top_logprobs) == 3 for entry in entries)
    assert all(entry.logprob == max(top.logprob for top in entry.top_logprobs) <= 0 for entry in entries)
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    echo = client.completions.create(
        model="builtin:tiny", prompt="Once upon a time", echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    found = echo.choices[0].logprobs
    assert found.token_logprobs[0] is None and all(value < 0 for value in found.token_logprobs[1:])
    assert len(found.tokens) == echo.usage.prompt_tokens + 1


def test_embeddings_are_the_same_however_they_are_sent(client: Any) -> None:
    coded = client.embeddings.create(model="builtin:tiny", input=["a shop", "opening hours"])
    plain = client.embeddings.create(model="builtin:tiny", input="a shop", encoding_format="float")
    assert len(coded.data) == 2 and len(plain.data[0].embedding) == 256
    assert coded.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-5)
    assert sum(value**2 for value in plain.data[0].embedding) == pytest.approx(1.0, abs=1e-4)


def test_json_that_a_schema_asks_for(client: Any) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {**schema, "additionalProperties": False}}}
    answer = client.chat.completions.create(
        model="builtin:tiny", messages=HELLO, response_format=wanted, max_completion_tokens=60
    )
    assert isinstance(json.loads(answer.choices[0].message.content)["ok"], bool)


def test_responses_whole_and_streamed(client: Any) -> None:
    whole = client.responses.create(model="builtin:tiny", input="Hello!", temperature=0)
    events = list(client.responses.create(model="builtin:tiny", input="Hello!", temperature=0, stream=True))
    assert whole.status == "completed" and whole.output_text
    assert events[-1].type == "response.completed" and events[-1].response.output_text == whole.output_text


def test_errors_are_the_clients_own_kinds(serving: Serving, client: Any) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="builtin:tiny", messages=HELLO, temperature=-1)
    with pytest.raises(openai.NotFoundError, match="builtin:tiny"):
        client.chat.completions.create(model="other", messages=HELLO)
    with pytest.raises(openai.AuthenticationError), openai.OpenAI(base_url=f"{serving.url}/v1", api_key="no") as other:
        other.models.list()
    assert [model.id for model in client.models.list()] == ["builtin:tiny"]


def test_a_hundred_who_leave_early_leave_no_page_behind(serving: Serving) -> None:
    body = {"messages": HELLO, "stream": True, "ignore_eos": True, "max_tokens": 1500}
    headers = {"Authorization": "Bearer secret"}

    async def leave(client: httpx.AsyncClient, lines: int) -> None:
        async with client.stream("POST", f"{serving.url}/v1/chat/completions", json=body, headers=headers) as answer:
            seen = answer.aiter_lines()
            for _ in range(lines):
                await anext(seen)

    async def main() -> None:
        limits = httpx.Limits(max_connections=10)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            await asyncio.gather(*(leave(client, number % 7) for number in range(100)))

    asyncio.run(main())
    wait_until(lambda: get(serving, "/debug/stats").json()["engine"]["num_running"] == 0)
    stats = get(serving, "/debug/stats").json()
    assert stats["engine"]["pages_used"] == 0 and stats["engine"]["num_known"] == 0 and stats["places_taken"] == 0


def test_a_killed_engine_is_told_of_and_comes_back(serving: Serving, client: Any) -> None:
    import openai

    stream = client.chat.completions.create(
        model="builtin:tiny", messages=HELLO, stream=True, max_tokens=1800, extra_body={"ignore_eos": True}
    )
    seen = iter(stream)
    next(seen), next(seen)
    with asked_all_along(serving, "/health") as answers:
        serving.engine().kill()
        with pytest.raises(openai.APIError, match="engine"):
            list(seen)
        wait_until(
            lambda: [code for code, _ in groupby(each.status_code for each in answers)] == [200, 503, 200], START_S
        )
    assert {each.json()["error"]["code"] for each in answers if each.status_code == 503} == {"engine_unavailable"}
    assert client.chat.completions.create(model="builtin:tiny", messages=HELLO).choices[0].message.content


def test_sigterm_lets_what_runs_end_and_takes_nothing_new(serving: Serving, client: Any) -> None:
    """The last test of this server."""
    body = {"ignore_eos": True}
    stream = client.chat.completions.create(
        model="builtin:tiny", messages=HELLO, stream=True, max_tokens=300, extra_body=body
    )
    seen = iter(stream)
    next(seen)
    engine = serving.engine()
    serving.process.send_signal(signal.SIGTERM)
    rest = list(seen)
    assert rest[-1].choices[0].finish_reason == "length"
    assert serving.process.wait(60) == 0
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
    log = " ".join(serving.log.read_text().split())
    assert "finishing 1 answer, at most 10 s" in log and "stopped: the requests under way were answered" in log
    assert "the engine is ready again" in log


def test_mistakes_of_use_are_told_before_anything_loads(tunesmith_cli: Any) -> None:
    open_to_all = tunesmith_cli("serve", "builtin:tiny", "--host", "0.0.0.0", env={"TUNESMITH_API_KEYS": ""})
    assert open_to_all.returncode == 2 and "--allow-unauthenticated" in open_to_all.stderr


@pytest.mark.long
def test_a_model_that_is_not_there_is_one_line(tunesmith_cli: Any) -> None:
    nothing = tunesmith_cli("serve", "builtin:tinny", "--port", "0")
    assert nothing.returncode == 2 and "did you mean 'tiny'" in nothing.stderr

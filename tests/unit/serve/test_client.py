"""The engine's process dies, hangs, or can't load: what those who wait are told, and how it comes back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from serve_fakes import SAYS, Served, data_objects, error_of, in_server, served

from tunesmith.engine.request import SamplingParams, StructuredSpec
from tunesmith.errors import ModelError, RequestError
from tunesmith.serve import client as client_module
from tunesmith.serve import messages
from tunesmith.serve.client import EngineStartError
from tunesmith.serve.errors import engine_down
from tunesmith.serve.mailbox import Choices, Mailbox
from tunesmith.serve.messages import End, Frames, pack
from tunesmith.serve.params import params_from_plain, params_to_plain


@pytest.fixture(autouse=True)
def _quick_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_BACKOFF_S", 0.2)


def test_messages_survive_the_way_however_it_is_cut() -> None:
    said: list[Any] = [
        messages.Submit(1, [1, 2], {"logit_bias": {5: 1.0}}, cache_salt="你"),
        messages.Outputs([[1, [3], "x", [[3, -0.5, [[3, -0.5]]]], End("stop", None, 1, 1).as_list()]]),
        messages.Stats({"steps": 1}),
    ]
    raw = b"".join(pack(message) for message in said)
    for size in (1, 3, 7, len(raw)):
        frames = Frames()
        got = [m for at in range(0, len(raw), size) for m in frames.feed(raw[at : at + size])]
        assert got == said
    with pytest.raises(ValueError, match="frame"):
        list(Frames().feed(b"\xff\xff\xff\xff"))


def test_parameters_survive_the_way() -> None:
    spec = StructuredSpec("choice", ("a", "b"))
    params = SamplingParams(max_tokens=3, temperature=0.5, stop=("x",), logit_bias={3: 1.0}, structured=spec)
    assert params_from_plain(params_to_plain(params)) == params
    assert params_to_plain(SamplingParams()) == {}
    with pytest.raises(RequestError, match="top_p"):
        params_from_plain({"top_p": 3})


def test_a_reader_that_lags_finds_everything_joined() -> None:
    async def main() -> None:
        box = Mailbox([Choices(2, None, 2)] * 2)
        box.put(0, [5, [1], "a", [[1, -1.0, []]], None])
        box.put(0, [5, [2], "b", [[2, -2.0, []]], None])
        box.put(1, [6, [9], "z", None, End("stop").as_list()])
        taken = await box.take()
        assert taken[0].token_ids == [1, 2] and taken[0].text == "ab" and len(taken[0].logprobs or []) == 2
        box.put(0, [5, [], "", None, End("length").as_list()])
        assert (await box.take())[0].end == End("length")
        assert await box.take() == {}

    asyncio.run(main())


@in_server(step_s=0.05)
async def test_a_dead_engine_is_started_again_and_those_who_waited_are_told(one: Served) -> None:
    whole = asyncio.create_task(one.chat())
    stream = asyncio.create_task(one.chat(stream=True))
    await one.until(lambda: one.fake.num_steps > 2)
    one.links[0].kill()
    assert error_of(await whole, 503)["code"] == "engine_unavailable"
    last = data_objects(await stream)
    assert last[-1] == "[DONE]" and last[-2]["error"]["code"] == "engine_unavailable"
    for path in ("/health", "/ready"):
        response = await one.client.get(path)
        assert error_of(response, 503) and int(response.headers["retry-after"]) >= 1
    assert error_of(await one.chat(), 503)
    await one.until(lambda: one.server.engine.status == "ready")
    assert len(one.fakes) == 2 and one.server.engine.num_restarts == 1
    assert (await one.client.get("/health")).status_code == 200
    assert (await one.chat()).json()["choices"][0]["message"]["content"] == SAYS
    assert one.server.admission.num_taken == 0


@in_server(adapters=(("mine", "/somewhere"), ("lost", "nowhere")))
async def test_a_new_engine_gets_the_adapters_again(one: Served) -> None:
    one.links[0].kill()
    await one.until(lambda: len(one.fakes) == 2 and one.server.engine.status == "ready")
    await one.until(lambda: "lost" not in one.server.adapters)
    assert set(one.server.adapters) == {"mine"}


@in_server(stall_s=0.8, hang_s=1.6)
async def test_an_engine_that_hangs_is_unhealthy_then_started_again(one: Served) -> None:
    one.fake.hangs.set()
    answer = asyncio.create_task(one.chat())
    await one.until(lambda: not one.server.engine.is_healthy)
    assert "nowhere" in error_of(await one.client.get("/health"), 503)["message"]
    assert error_of(await answer, 503)
    await one.until(lambda: one.server.engine.status == "ready")
    assert (await one.client.get("/health")).status_code == 200


@in_server()
async def test_an_engine_that_can_t_be_loaded_again_says_why(one: Served) -> None:
    """Its exit code was told in place of its words."""
    one.failures.append(MemoryError("too little of it"))
    one.links[0].kill()
    await one.until(lambda: "too little" in (one.server.engine.trouble or ""))
    assert "too little" in error_of(await one.client.get("/ready"), 503)["message"]
    one.failures.clear()
    await one.until(lambda: one.server.engine.status == "ready")


@in_server()
async def test_a_step_that_breaks_fails_its_requests_and_a_second_one_ends_the_process(one: Served) -> None:
    one.fake.breaks = True
    assert "step" in error_of(await one.chat(), 500)["message"]
    assert error_of(await one.chat(), 500)
    await one.until(lambda: len(one.fakes) == 2 and one.server.engine.status == "ready")
    assert (await one.chat()).status_code == 200


@pytest.mark.parametrize(("failure", "exit_code"), [(ModelError("no such model"), 2), (MemoryError("too little"), 1)])
def test_a_model_that_cannot_be_loaded_is_no_server(failure: Exception, exit_code: int) -> None:
    async def main() -> None:
        async with served(failure=failure):
            raise AssertionError("it was loaded")

    with pytest.raises(EngineStartError, match=r"no such model|too little") as caught:
        asyncio.run(main())
    assert caught.value.exit_code == exit_code


@in_server(step_s=0.05)
async def test_requests_that_outlive_the_grace_are_told(one: Served) -> None:
    stream = asyncio.create_task(one.chat(stream=True))
    await one.until(lambda: one.fake.num_steps > 1)
    one.server.is_draining = True
    assert error_of(await one.chat(), 503) and error_of(await one.client.get("/ready"), 503)
    assert error_of(await one.client.get("/health"), 503)
    one.server.engine.fail_all(engine_down("the server is shutting down"))
    assert "shutting down" in data_objects(await stream)[-2]["error"]["message"]
    await one.until(lambda: not one.fake.running)

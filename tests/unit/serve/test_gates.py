"""What stands before the routes: keys, sizes, the queue's places, time; and who leaves early."""

from __future__ import annotations

import asyncio
import gzip
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from serve_fakes import Served, data_objects, error_of, in_server

from tunesmith.errors import RequestError
from tunesmith.serve import stream as stream_module
from tunesmith.serve.auth import check_address, read_keys
from tunesmith.serve.limits import is_too_deep

KEYS = ("first-key", "second-key")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@in_server(api_keys=KEYS)
async def test_every_route_but_health_wants_a_key(one: Served) -> None:
    for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nothing"):
        assert error_of(await one.client.get(path), 401)["code"] == "invalid_api_key"
        assert (await one.client.get(path, headers=bearer("first-key"))).status_code in (200, 404)
        assert (await one.client.get(path, headers=bearer("second-key"))).status_code in (200, 404)
    for wrong in ({}, bearer(""), bearer("first"), bearer("first-key2"), {"Authorization": "Basic first-key"}):
        error = error_of(await one.client.post("/v1/chat/completions", json={}, headers=wrong), 401)
        is_missing = wrong in ({}, bearer("")) or "Basic" in str(wrong)
        assert ("wants an API key" if is_missing else "is not one of the server's") in error["message"]
    for path in ("/health", "/ready"):
        assert (await one.client.get(path)).status_code == 200


def test_keys_come_from_options_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one  # the web page\n\n# nothing\ntwo\n", encoding="utf-8")
    assert read_keys(["zero", "one"], file, {"TUNESMITH_API_KEYS": "three, four"}) == (
        "zero", "one", "three", "four", "two",
    )  # fmt: skip
    assert read_keys([], None, {}) == ()
    with pytest.raises(RequestError, match="can't be read"):
        read_keys([], tmp_path / "none", {})
    file.write_text("# only words\n", encoding="utf-8")
    with pytest.raises(RequestError, match="has none"):
        read_keys([], file, {})
    with pytest.raises(RequestError, match="ASCII"):
        read_keys(["schlüssel"], None, {})


def test_other_addresses_want_keys() -> None:
    for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9"):
        check_address(host, None, (), False)
    check_address("0.0.0.0", None, ("key",), False)
    check_address("0.0.0.0", None, (), True)
    check_address("0.0.0.0", "/tmp/socket", (), False)
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(RequestError, match="api-key-file"):
            check_address(host, None, (), False)


@in_server(max_body_bytes=1000, max_header_bytes=600, max_json_depth=5)
async def test_sizes_are_limited(one: Served) -> None:
    assert error_of(await one.chat("x" * 2000), 413)["code"] == "body_too_large"
    chunks = (b'{"messages":', b'"' + b"x" * 2000 + b'"}')

    async def body() -> Any:
        for chunk in chunks:
            yield chunk

    json_type = {"Content-Type": "application/json"}
    assert error_of(await one.client.post("/v1/chat/completions", content=body(), headers=json_type), 413)
    assert error_of(await one.client.get("/version", headers={"X-Long": "x" * 700}), 431)
    deep = b'{"a":' + b"[" * 40 + b"]" * 40 + b"}"
    assert error_of(await one.client.post("/tokenize", content=deep, headers=json_type), 400)["code"] == "bad_json"


def test_depth_is_counted_outside_of_texts() -> None:
    assert not is_too_deep(b'{"a": "[[[[[[[["}', 3)
    assert not is_too_deep(b'{"a": "\\"[[[[[[[[", "b": [[1], [2]]}', 3)
    assert not is_too_deep(b"[" + b"[1]," * 100 + b"[2]]", 3)
    assert is_too_deep(b"[[[[1]]]]", 3)
    assert is_too_deep(b"[" * 100_000, 64)
    assert is_too_deep(b"[" * 9 + b'"' + b"\\", 8) and not is_too_deep(b"[" * 9 + b"]" * 9 + b'"\\', 9)
    assert is_too_deep(b"[" + b"[]," * 2**20 + b"[]]", 64)
    begin_s = time.process_time()
    assert is_too_deep(b"[" * 65 + b'"' + b'\\"' * 2**17, 64)
    assert time.process_time() - begin_s < 2, "a text without an end is read once"


@in_server()
async def test_bodies_that_are_no_request(one: Served) -> None:
    bodies = [
        b"", b"{", b"[]", b"null", b'{"prompt": NaN}', b"\xff\xfe", b'{"prompt": 1e999}',
        b'{"tokens": [' + b"1" * 5000 + b"]}",
    ]  # fmt: skip
    headers = {"Content-Type": "application/json"}
    for body in bodies:
        for path in ("/tokenize", "/detokenize", "/v1/completions"):
            error_of(await one.client.post(path, content=body, headers=headers), 400)
    error_of(await one.client.post("/tokenize", content=b"{}", headers={"Content-Type": "text/plain"}), 415)


async def _full(one: Served, num: int, headers: dict[str, str] | None = None) -> list[asyncio.Task[Any]]:
    body = {"messages": [{"role": "user", "content": "x"}]}
    tasks = [
        asyncio.create_task(one.client.post("/v1/chat/completions", json=body, headers=headers)) for _ in range(num)
    ]
    await one.until(lambda: one.server.admission.num_taken >= num)
    return tasks


@in_server(max_num_seqs=2, max_waiting=2, step_s=0.05)
async def test_a_full_queue_turns_requests_away_at_once(one: Served) -> None:
    tasks = await _full(one, 4)
    response = await one.chat()
    assert error_of(response, 429)["type"] == "rate_limit_error" and int(response.headers["retry-after"]) >= 1
    assert (await one.client.get("/health")).status_code == 200
    assert response.headers["connection"] == "keep-alive"
    assert [(await task).status_code for task in tasks] == [200] * 4
    one.server.settle()
    assert one.server.admission.max_places == 6
    one.server.admission.max_places = one.server.admission.max_by_key = 4
    assert one.server.admission.num_taken == 0
    assert (await one.chat(n=4)).status_code == 200
    assert error_of(await one.chat(n=5), 400)["param"] == "n"


@in_server(max_num_seqs=2, max_waiting=2, step_s=0.05, api_keys=KEYS)
async def test_a_key_has_a_share_of_the_places(one: Served) -> None:
    tasks = await _full(one, 2, bearer("first-key"))
    body = {"messages": [{"role": "user", "content": "x"}]}
    greedy = await one.client.post("/v1/chat/completions", json=body, headers=bearer("first-key"))
    assert "key" in error_of(greedy, 429)["message"] or greedy.status_code == 429
    other = await one.client.post("/v1/chat/completions", json=body, headers=bearer("second-key"))
    assert other.status_code == 200
    await asyncio.gather(*tasks)


@in_server(step_s=0.15, max_timeout_s=1.5)
async def test_time_is_limited_by_field_header_and_server(one: Served) -> None:
    assert error_of(await one.chat(timeout=0.1), 408)["code"] == "timeout"
    headers = {"X-Request-Timeout": "1.0"}
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    for _ in range(20):  # without a first piece in time, as on a machine that stands still, it is a 408, no stream
        response = await one.client.post("/v1/chat/completions", json=body, headers=headers)
        if response.status_code == 200:
            break
        assert error_of(response, 408)["code"] == "timeout"
    assert data_objects(response)[-2]["error"]["code"] == "timeout"
    assert error_of(await one.chat(), 408)
    bad = await one.client.post("/v1/chat/completions", json=body, headers={"X-Request-Timeout": "soon"})
    assert error_of(bad, 400)["param"] == "X-Request-Timeout"
    await one.until(lambda: not one.fake.running)


async def _leave_early(one: Served, after_chunks: int | None, stream: bool) -> list[Any]:
    """Call the application as a server would, and close the connection."""
    import json

    body = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": stream}).encode()
    sent: list[Any] = []
    gone = asyncio.Event()
    given = False

    async def receive() -> Any:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if after_chunks is not None and len(sent) > after_chunks:
            gone.set()

    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions",
        "query_string": b"", "headers": [(b"content-type", b"application/json")], "http_version": "1.1",
        "scheme": "http", "server": ("test", 80), "client": ("test", 1), "root_path": "",
    }  # fmt: skip
    task = asyncio.create_task(one.app(scope, receive, send))
    if after_chunks is None:
        await one.until(lambda: one.fake.running)
        gone.set()
    await task
    return sent


@in_server(step_s=0.02)
async def test_a_client_that_leaves_ends_its_answer(one: Served) -> None:
    sent = await _leave_early(one, 2, stream=True)
    assert 3 <= len(sent) < 10
    await one.until(lambda: not one.fake.running)
    await _leave_early(one, None, stream=False)
    await one.until(lambda: not one.fake.running)
    assert one.server.admission.num_taken == 0 and not one.server.engine._boxes
    text = one.server.metrics.render().decode()
    assert 'finished_reason="abort",model_name="tiny"} 2.0' in text


@in_server(step_s=0.001)
async def test_many_who_leave_early_leave_nothing_behind(one: Served) -> None:
    await asyncio.gather(*(_leave_early(one, number % 5, stream=True) for number in range(100)))
    await one.until(lambda: not one.fake.running)
    assert one.server.admission.num_taken == 0 and not one.server.engine._boxes
    assert (await one.server.engine.ask_stats())["pages_used"] == 0


@in_server(cors_origins=("https://page.example",), api_keys=KEYS)
async def test_other_origins_only_where_they_are_named(one: Served) -> None:
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    allowed = await one.client.options("/v1/chat/completions", headers=asked)
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    refused = await one.client.options("/v1/chat/completions", headers={**asked, "Origin": "https://other.example"})
    assert "access-control-allow-origin" not in refused.headers


@in_server()
async def test_no_foreign_origin_is_allowed_by_default(one: Served) -> None:
    """A page that gives itself this machine's address (DNS rebinding) was answered like any program."""
    for origin in ("https://page.example", "null", "http://localhost.page.example", "http://[", "http://127.0.0.1@x"):
        response = await one.client.get("/version", headers={"Origin": origin})
        assert error_of(response, 403)["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in response.headers
    for origin in ("http://localhost:3000", "http://127.0.0.1", "http://[::1]:8000"):
        assert (await one.client.get("/version", headers={"Origin": origin})).status_code == 200
    assert (await one.client.get("/health", headers={"Origin": "https://page.example"})).status_code == 200


@in_server(api_keys=KEYS)
async def test_with_a_key_the_origin_does_not_matter(one: Served) -> None:
    headers = {"Origin": "https://page.example", **bearer("first-key")}
    assert (await one.client.get("/version", headers=headers)).status_code == 200


@in_server()
async def test_compressed_bodies_are_refused_as_what_they_are(one: Served) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    response = await one.client.post("/tokenize", content=gzip.compress(b'{"prompt": "x"}'), headers=headers)
    assert "Content-Encoding" in error_of(response, 415)["message"]


@in_server()
async def test_a_client_that_does_not_read_holds_no_place_for_ever(one: Served) -> None:
    """Its stream waited in `send`, where no deadline reached it."""
    never = asyncio.Event()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await never.wait()

    async def receive() -> Any:
        return await asyncio.shield(asyncio.Event().wait())

    async def events() -> Any:
        yield "data: 1\n\n"

    loop = asyncio.get_running_loop()
    for _ in range(5):  # a machine that stands still may take one for later than it was
        left: list[bool] = []
        begin_s = loop.time()
        deadline_s = begin_s - stream_module.SLOW_READER_S + 0.1
        stream = stream_module.EventStream(
            events(), headers={}, on_close=partial(left.append, True), deadline_s=deadline_s
        )
        async with asyncio.timeout(60):
            await stream({"type": "http"}, receive, send)
        taken_s = loop.time() - begin_s
        assert left == [True]
        if taken_s < 5:
            break
    assert taken_s < 5


@in_server()
async def test_a_million_mistakes_are_refused_by_the_first(one: Served) -> None:
    """All of them were gathered, for ten seconds, while nobody else was answered."""
    begin_s = time.process_time()
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": [-1] * 300_000}),
        ("/detokenize", {"tokens": ["x"] * 300_000}),
        ("/v1/completions", {"prompt": "x", "logit_bias": dict.fromkeys(map(str, range(100_000)), "x")}),
        ("/v1/chat/completions", {"messages": [{"role": "robot"}] * 16_000}),
    ]
    for path, body in wrong:
        assert len(error_of(await one.post(path, **body), 400)["message"]) < 500
    assert time.process_time() - begin_s < 4

"""What somebody who is new to the server reads: what a model is, their own letters, what was wrong and what to do."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import httpx
from serve_fakes import SAYS, Served, error_of, in_server

from tunesmith.rundir.model_notes import ModelNotes, write_notes
from tunesmith.serve.errors import dumps, to_bytes


@in_server(allow_adapter_loading=True)
async def test_models_say_whether_they_learnt_from_single_questions(one: Served) -> None:
    assert not (await one.client.get("/v1/models/tiny")).json()["single_turns"]
    one.server.engine.facts["single_turns"] = True
    with tempfile.TemporaryDirectory() as single:
        write_notes(Path(single), ModelNotes(single_turns=True))
        for name, path in (("single", single), ("other", "/somewhere")):
            await one.post("/v1/load_lora_adapter", lora_name=name, lora_path=path)
    cards = {card["id"]: card["single_turns"] for card in (await one.client.get("/v1/models")).json()["data"]}
    assert cards == {"tiny": True, "other-name": True, "single": True, "other": False}


@in_server()
async def test_letters_are_sent_as_they_are(one: Served) -> None:
    """The bug: curl showed Chinese answers as \\uXXXX."""
    prompt = {"prompt": "Once", "max_tokens": 99}
    for more in ({}, {"stream": True}, {"logprobs": 1}, {"stream": True, "logprobs": 1}):
        raw = (await one.post("/v1/completions", **prompt, **more)).content
        assert "你".encode() in raw and "ï".encode() in raw and b"\\u" not in raw, more
    for more in ({}, {"stream": True}):
        raw = (await one.chat(**more)).content
        assert "你".encode() in raw and b"\\u" not in raw, more
    assert SAYS in (await one.post("/v1/responses", input="Hi")).content.decode()
    assert "没有" in (await one.chat(model="没有")).content.decode()
    answer = await one.client.post(
        "/v1/chat/completions", content=b'{"model": "a\\ud800b"}', headers={"content-type": "application/json"}
    )
    assert error_of(answer, 400)


def test_json_is_one_line_of_utf_8_whatever_the_text_is() -> None:
    """httpx ends a line at U+2028 too, so a stream's object may not hold one as it is; half a pair is no UTF-8."""
    text = "a\u2028b\u2029c\x85d\x0b\x1c\ud83de 你好 \U0001f600"
    raw = to_bytes(dumps({"text": text}))
    assert json.loads(raw) == {"text": text} and "你好 \U0001f600".encode() in raw
    lines = httpx.Response(200, content=b"data: " + raw + b"\n\n").iter_lines()
    assert next(lines) == "data: " + raw.decode()

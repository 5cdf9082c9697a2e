"""What somebody who is new to the server reads: what a model is, their own letters, what was wrong and what to do."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from serve_fakes import SAYS, Served, error_of, in_server

from tunesmith.cli.serve import _announce
from tunesmith.compress.quantize import compress_to_directory
from tunesmith.kernels.fp8 import without_products
from tunesmith.rundir.model_notes import ModelNotes, write_notes
from tunesmith.serve.errors import dumps, to_bytes
from tunesmith.serve.loading import load_model
from tunesmith.serve.options import EngineOptions, ServerOptions
from tunesmith.serve.run import Stop


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
    for stream in (False, True):
        raw = (await one.chat(stream=stream)).content
        assert "你".encode() in raw and b"\\u" not in raw, stream
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


def test_whoever_stops_a_server_is_told_what_it_waits_for(caplog: pytest.LogCaptureFixture) -> None:
    """The bug: Ctrl-C said nothing for half a minute, then that requests were answered, where there had been none."""

    def stop_with(num: int) -> list[str]:
        @in_server(step_s=0.01)
        async def stop(one: Served) -> None:
            http = SimpleNamespace(should_exit=False, force_exit=False, config=SimpleNamespace())
            stop = Stop(one.server, http)
            asked = [asyncio.create_task(one.chat()) for _ in range(num)]
            await one.until(lambda: one.server.admission.num_taken == num)
            stop.begin(signal.SIGTERM)
            assert stop.has_waited is bool(num) and http.should_exit is not bool(num)
            if num:
                for path in ("/health", "/ready"):
                    assert "shutting down" in error_of(await one.client.get(path), 503)["message"]
            assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200] * num
            await one.until(lambda: http.should_exit)
            stop.remove()
            assert not stop.has_cut

        caplog.clear()
        with caplog.at_level(logging.WARNING):
            stop()
        return [record.message for record in caplog.records]

    assert stop_with(0) == []
    (line,) = stop_with(2)
    assert line.startswith("finishing 2 answers, at most 30 s; ")


@in_server()
async def test_a_field_that_is_unknown_is_told_where_it_belongs(one: Served) -> None:
    """The bug: `foo` was told to be `tools`, and `prompt` in a chat `prompt_logprobs`."""

    async def said(path: str, **body: object) -> str:
        return str(error_of(await one.post(path, **body), 400)["message"])

    talk = {"messages": [{"role": "user", "content": "Hi"}]}
    assert "did you mean" not in await said("/v1/chat/completions", **talk, foo=1)
    assert "belongs to /v1/completions" in await said("/v1/chat/completions", **talk, prompt="Hi")
    assert "belongs to /v1/chat/completions" in await said("/v1/completions", prompt="Hi", **talk)
    assert "did you mean 'max_tokens'?" in await said("/v1/chat/completions", **talk, max_token=1)
    root = error_of(await one.client.get("/"), 404)["message"]
    assert "/v1" in root and "/openapi.json" in root


@in_server()
async def test_an_empty_text_is_called_so(one: Served) -> None:
    """The bug: "input: string should have at least 1 character; input: input should be a valid list"."""
    assert error_of(await one.post("/v1/embeddings", input=""), 400)["message"] == "input: the text is empty"
    both = error_of(await one.post("/v1/completions", prompt="", n=0), 400)["message"]
    assert "prompt: the text is empty" in both and "n: " in both


def test_a_compressed_model_is_said_to_be_one(tmp_path: Path) -> None:
    """An int4 model was "7.75 MB of float32"."""
    small = tmp_path / "small"
    compress_to_directory("builtin:tiny", small, "int4", device="cpu")
    formats = {}
    for model, asked in ((str(small), None), ("builtin:tiny", "int8"), ("builtin:tiny", None)):
        options = EngineOptions(model=model, device="cpu", max_model_len=64, quantization=asked)
        formats[model, asked] = load_model(options, lambda _: None).facts["quantization"]
    assert list(formats.values()) == ["int4", "int8", None]


def test_an_adapter_that_is_served_on_a_cpu_is_said_to_be_slower(capsys: pytest.CaptureFixture[str]) -> None:
    """Answers of a run took five times as long as those of the same model merged, without a word."""
    facts = {"weights": "1 MB", "dtype": "float32", "quantization": "int4", "device": "cpu", "max_model_len": 64}
    facts |= {"max_num_seqs": 1, "is_native": True, "has_chat_template": True, "has_own_adapter": True}
    options = ServerOptions(names=("shop",))
    news = {"facts": facts, "address": ("127.0.0.1", 1), "start_s": 1.0}
    _announce(options, news)
    said = " ".join(capsys.readouterr().err.split())
    assert "1 MB of float32 as int4 on cpu" in said and "faster is what tunesmith merge makes of it" in said
    _announce(options, {**news, "facts": {**facts, "has_own_adapter": False}})
    assert "merge" not in capsys.readouterr().err


@in_server()
async def test_what_litellm_sends_and_reads(one: Served) -> None:
    """Its own note in our answer came back with the next turn and was refused; a long prompt was not known for one."""
    said = {"role": "assistant", "content": "Hello"}
    ask = {"role": "user", "content": "Hi"}
    for note, status in (({"refusal": None}, 200), ({}, 200), (None, 200), ({"refusal": "no"}, 400)):
        turns = [ask, {**said, "provider_specific_fields": note}, ask]
        assert (await one.post("/v1/chat/completions", messages=turns)).status_code == status
    for path, body in (("/v1/completions", {"prompt": [1] * 300}), ("/v1/embeddings", {"input": [1] * 300})):
        error = error_of(await one.post(path, **body), 400)
        assert error["message"].startswith("this model's maximum context length is 256 tokens; ")
        assert error["code"] == "context_length_exceeded"


def test_fp8_on_a_gpu_without_its_products_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It was held in fp8 and multiplied in bfloat16 without a word, where training refuses."""
    with monkeypatch.context() as a6000:
        a6000.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
        a6000.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX A6000")
        said = without_products("cuda")
        a6000.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
        assert without_products("cuda") is None
    assert said is not None and "NVIDIA RTX A6000 (sm_86) has no fp8 products" in said and "held in fp8" in said
    assert without_products("cpu") is None
    for place in ("tunesmith.checkpoint.load", "tunesmith.serve.loading"):
        monkeypatch.setattr(f"{place}.without_products", lambda device: said)
    for asked, fact in (("fp8", said), ("int8", None)):
        caplog.clear()
        options = EngineOptions(model="builtin:tiny", device="cpu", max_model_len=64, quantization=asked)
        assert load_model(options, lambda _: None).facts["fp8"] == fact
        assert [record.getMessage() for record in caplog.records].count(said) == (fact is not None)

"""Completions, responses, embeddings, tokens, models, health and metrics with a fake engine."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

from serve_fakes import END, SAYS, Served, data_objects, error_of, in_server, tokenizer

from tunesmith.serve.state import load_adapters


@in_server()
async def test_a_completion_of_a_text_and_of_ids(one: Served) -> None:
    ids = tokenizer().encode("Once upon")
    for prompt in ("Once upon", ids, ["Once upon"], [ids]):
        answer = (await one.post("/v1/completions", prompt=prompt, max_tokens=99)).json()
        assert answer["object"] == "text_completion"
        (choice,) = answer["choices"]
        assert choice["text"] == SAYS and choice["finish_reason"] == "stop" and choice["logprobs"] is None
        assert answer["usage"]["prompt_tokens"] == len(ids)
    assert {s["prompt"] for s in one.fake.submitted} == {"Once upon"}
    assert all(submitted["text_context"] for submitted in one.fake.submitted)
    await one.post("/v1/completions", prompt="Once")
    assert one.fake.submitted[-1]["params"].max_tokens == 16


@in_server()
async def test_several_prompts_and_choices_are_in_order(one: Served) -> None:
    answer = (await one.post("/v1/completions", prompt=["one", "two"], n=2, echo=True, max_tokens=2)).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [text[:3] for text in texts] == ["one", "one", "two", "two"]
    lengths = [len(tokenizer().encode(text)) for text in ("one", "two")]
    assert answer["usage"] == {
        "prompt_tokens": sum(lengths), "completion_tokens": 8, "total_tokens": sum(lengths) + 8,
        "prompt_tokens_details": {"cached_tokens": 2},
    }  # fmt: skip


@in_server()
async def test_echo_with_logprobs_is_what_scorers_read(one: Served) -> None:
    """lm-eval reads token_logprobs and top_logprobs of the prompt, and drops the last, generated token."""
    ids = tokenizer().encode("Once upon a time")
    body = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1}
    found = (await one.post("/v1/completions", **body)).json()["choices"][0]["logprobs"]
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["top_logprobs"]) == len(ids) + 1
    assert found["token_logprobs"][1:-1] == [-1.0] * (len(ids) - 1)
    assert all(isinstance(top, dict) and top for top in found["top_logprobs"][1:])
    assert found["text_offset"][:3] == [0, 4, 9]
    only = (await one.post("/v1/completions", **{**body, "max_tokens": 0})).json()
    assert len(only["choices"][0]["logprobs"]["tokens"]) == len(ids)
    assert only["choices"][0]["text"] == "Once upon a time" and only["usage"]["completion_tokens"] == 0


@in_server()
async def test_a_completion_as_it_comes(one: Served) -> None:
    body = {"prompt": "Once", "stream": True, "logprobs": 0, "stream_options": {"include_usage": True}}
    chunks = data_objects(await one.post("/v1/completions", **body, max_tokens=99))
    assert chunks[-1] == "[DONE]" and chunks[-2]["choices"] == [] and chunks[-2]["usage"]["prompt_tokens"] == 1
    parts = [chunk["choices"][0] for chunk in chunks[:-2]]
    assert "".join(part["text"] for part in parts) == SAYS
    assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1]["finish_reason"] == "stop"
    assert sum(len(part["logprobs"]["tokens"]) for part in parts) == len(tokenizer().encode(SAYS)) + 1
    echoed = data_objects(await one.post("/v1/completions", prompt="Once", echo=True, stream=True, max_tokens=1))
    assert echoed[0]["choices"][0]["text"].startswith("Once")


@in_server()
async def test_offsets_are_places_in_the_text(one: Served) -> None:
    """Each part of a character counted as one, and so did every letter of a control token that is not shown."""
    prompt = "<|im_end|>a 😀é b"
    ids = tokenizer().encode(prompt, parse_special=True)
    choice = (await one.post("/v1/completions", prompt=ids, echo=True, logprobs=0, max_tokens=9)).json()["choices"][0]
    found, text = choice["logprobs"], choice["text"]
    assert text.startswith("a 😀é bThe answer") and found["text_offset"][0] == found["text_offset"][1] == 0
    places = dict(zip(found["tokens"], found["text_offset"], strict=True))
    assert places[" answer"] == text.index(" answer") and places["The"] == text.index("The")
    shown = (await one.post("/v1/completions", prompt=ids, echo=True, logprobs=0, skip_special_tokens=False)).json()
    offsets, text = shown["choices"][0]["logprobs"]["text_offset"], shown["choices"][0]["text"]
    assert text.startswith(prompt) and offsets[1] == len("<|im_end|>")
    body = {"prompt": ids, "logprobs": 0, "max_tokens": 99}
    whole = (await one.post("/v1/completions", **body)).json()["choices"][0]["logprobs"]["text_offset"]
    chunks = data_objects(await one.post("/v1/completions", **body, stream=True))[:-1]
    assert [at for chunk in chunks for at in chunk["choices"][0]["logprobs"]["text_offset"]] == whole
    assert whole[-1] == len(SAYS)


@in_server()
async def test_prompt_logprobs(one: Served) -> None:
    answer = (await one.post("/v1/completions", prompt="Once upon", prompt_logprobs=1)).json()
    first, second = answer["choices"][0]["prompt_logprobs"]
    (entry,) = second.values()
    assert first is None and entry == {"logprob": -1.0, "rank": 1, "decoded_token": " upon"}


REFUSED_COMPLETIONS: list[tuple[str, dict[str, Any]]] = [
    ("suffix", {"suffix": "x"}),
    ("best_of", {"best_of": 2}),
    ("max_tokens", {"max_tokens": 0}),
    ("logprobs", {"logprobs": 1, "echo": True, "stream": True}),
    ("prompt", {"prompt": [5000]}),
    ("prompt", {"prompt": ""}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": [[]]}),
    ("prompt", {"prompt": [1] * 300}),
    ("prompt", {"prompt": ["x"] * 300}),
    ("prompt", {"prompt": None}),
    ("prompt_embeds", {"prompt_embeds": "x"}),
]


@in_server()
async def test_completions_that_are_refused(one: Served) -> None:
    for param, body in REFUSED_COMPLETIONS:
        response = await one.post("/v1/completions", **{"prompt": "x", **body})
        assert str(error_of(response, 400)["param"]).startswith(param), body


@in_server()
async def test_long_prompts_are_cut_where_that_is_asked_for(one: Served) -> None:
    await one.post("/v1/completions", prompt=list(range(10, 40)), truncate_prompt_tokens=3)
    assert one.fake.submitted[0]["prompt"] == tokenizer().decode([37, 38, 39])


@in_server()
async def test_a_response(one: Served) -> None:
    body = {
        "input": "Hi",
        "instructions": "Be kind.",
        "metadata": {"a": "b"},
        "include": ["message.output_text.logprobs"],
    }
    answer = (await one.post("/v1/responses", **body)).json()
    assert answer["object"] == "response" and answer["status"] == "completed" and answer["metadata"] == {"a": "b"}
    part = answer["output"][0]["content"][0]
    assert part["type"] == "output_text" and part["text"] == SAYS and part["logprobs"]
    assert answer["usage"]["total_tokens"] == answer["usage"]["input_tokens"] + answer["usage"]["output_tokens"]
    assert one.fake.submitted[0]["prompt"].startswith("<|im_start|>system\nBe kind.<|im_end|>")
    turns = [*answer["output"], {"role": "user", "content": "?"}]
    cut = (await one.post("/v1/responses", input=turns, max_output_tokens=2)).json()
    assert cut["status"] == "incomplete" and cut["incomplete_details"] == {"reason": "max_output_tokens"}
    wanted = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}}
    await one.post("/v1/responses", input="x", text=wanted)
    assert one.fake.submitted[-1]["params"].structured.kind == "json_schema"


@in_server()
async def test_a_response_as_it_comes(one: Served) -> None:
    events = data_objects(await one.post("/v1/responses", input="Hi", stream=True))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert "".join(event["delta"] for event in events if event["type"].endswith(".delta")) == SAYS
    assert [event["sequence_number"] for event in events] == list(range(len(events)))


@in_server(step_s=0.1)
async def test_a_response_that_fails_in_the_middle_says_so(one: Served) -> None:
    failed = data_objects(await one.post("/v1/responses", input="fail later", stream=True))
    assert failed[-1]["type"] == "response.failed" and failed[-1]["response"]["status"] == "failed"


REFUSED_RESPONSES: list[tuple[str, dict[str, Any]]] = [
    ("store", {"store": True}),
    ("previous_response_id", {"previous_response_id": "x"}),
    ("tools", {"tools": [{"type": "web_search"}]}),
    ("background", {"background": True}),
    ("reasoning", {"reasoning": {"effort": "low"}}),
    ("top_logprobs", {"top_logprobs": 1}),
    ("input", {"input": []}),
]


@in_server()
async def test_responses_that_are_refused(one: Served) -> None:
    for param, body in REFUSED_RESPONSES:
        assert error_of(await one.post("/v1/responses", **{"input": "x", **body}), 400)["param"] == param


@in_server(pooling="last")
async def test_embeddings_as_numbers_and_as_base64(one: Served) -> None:
    plain = (await one.post("/v1/embeddings", input=["one two", "x"])).json()
    assert [item["index"] for item in plain["data"]] == [0, 1]
    assert plain["data"][0]["embedding"][1:] == [0.5, 0.0, 1.0]
    coded = (await one.post("/v1/embeddings", input=[5, 6, 7], encoding_format="base64", dimensions=4)).json()
    assert struct.unpack("<4f", base64.b64decode(coded["data"][0]["embedding"]))[0] == 3.0
    assert coded["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert error_of(await one.post("/v1/embeddings", input="x", dimensions=3), 400)["param"] == "dimensions"
    assert error_of(await one.post("/v1/embeddings", input=""), 400)["param"] == "input"
    assert error_of(await one.post("/v1/embeddings", input=[1] * 300), 400)["code"] == "context_length_exceeded"
    assert one.server.admission.num_taken == 0


@in_server()
async def test_tokens_there_and_back(one: Served) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    chat = (await one.post("/tokenize", messages=messages)).json()
    await one.post("/v1/chat/completions", messages=messages)
    text = (await one.post("/detokenize", tokens=chat["tokens"])).json()["prompt"]
    assert text == one.fake.submitted[0]["prompt"] and chat["max_model_len"] == 256
    plain = (await one.post("/tokenize", prompt="Hi there", return_token_strs=True)).json()
    assert plain["count"] == len(plain["token_strs"]) and plain["tokens"] == tokenizer().encode("Hi there")
    assert error_of(await one.post("/tokenize"), 400)["param"] == "prompt"
    assert error_of(await one.post("/detokenize", tokens=[99999]), 400)["param"] == "tokens"
    assert error_of(await one.post("/detokenize", tokens=[-1]), 400)["param"] == "tokens[0]"


@in_server(allow_adapter_loading=True)
async def test_models_and_adapters(one: Served) -> None:
    models = (await one.client.get("/v1/models")).json()["data"]
    assert [model["id"] for model in models] == ["tiny", "other-name"] and models[0]["max_model_len"] == 256
    assert models[0]["vocab_size"] == one.server.engine.facts["vocab_size"] > 256
    assert (await one.client.get("/v1/models/tiny")).json()["id"] == "tiny"
    assert error_of(await one.client.get("/v1/models/none"), 404)["code"] == "model_not_found"
    load = {"lora_name": "mine", "lora_path": "/somewhere"}
    assert (await one.post("/v1/load_lora_adapter", **load)).status_code == 200
    assert error_of(await one.post("/v1/load_lora_adapter", **load), 400)["param"] == "lora_name"
    bad = {"lora_name": "x", "lora_path": "nowhere"}
    assert "no adapter" in error_of(await one.post("/v1/load_lora_adapter", **bad), 400)["message"]
    broken = {"lora_name": "x", "lora_path": "/broken"}
    assert "is broken" in error_of(await one.post("/v1/load_lora_adapter", **broken), 400)["message"]
    again = await one.post("/v1/load_lora_adapter", **load, load_inplace=True, follow=True)
    assert again.status_code == 200
    assert (await one.client.get("/v1/models/mine")).json()["parent"] == "tiny"
    assert (await one.chat(model="mine")).json()["model"] == "mine"
    assert one.fake.submitted[0]["adapter"] == "mine"
    assert (await one.post("/v1/unload_lora_adapter", lora_name="mine")).status_code == 200
    assert error_of(await one.chat(model="mine"), 404)


@in_server()
async def test_adapters_are_not_loaded_unless_that_is_allowed(one: Served) -> None:
    load = {"lora_name": "mine", "lora_path": "/somewhere"}
    assert error_of(await one.post("/v1/load_lora_adapter", **load), 403)["type"] == "permission_error"
    assert error_of(await one.post("/v1/unload_lora_adapter", lora_name="mine"), 403)


@in_server(adapters=(("mine", "/somewhere"),))
async def test_nothing_says_that_it_is_ready_before_requests_are_answered(one: Served) -> None:
    """/v1/models listed a model that was still loading, and /ready forgot the adapters: scripts wait for both."""
    assert "adapters" in error_of(await one.client.get("/ready"), 503)["message"]
    assert error_of(await one.chat(model="mine"), 503) and (await one.chat()).status_code == 200
    await load_adapters(one.server)
    assert (await one.client.get("/ready")).status_code == 200 and (await one.chat(model="mine")).status_code == 200
    for status in ("starting", "restarting"):
        one.server.engine.status = status
        for path in ("/v1/models", "/v1/models/tiny", "/ready", "/health"):
            response = await one.client.get(path)
            assert error_of(response, 503) and int(response.headers["retry-after"]) >= 1
    one.server.engine.status = "ready"
    one.server.engine.stall_s = -1.0
    assert error_of(await one.client.get("/ready"), 503)


@in_server(metrics_prefix="vllm")
async def test_health_version_and_metrics(one: Served) -> None:
    for path in ("/health", "/ready"):
        assert (await one.client.get(path)).json() == {"status": "ok"}
    assert set((await one.client.get("/version")).json()) == {"version"}
    await one.chat()
    await one.chat(stream=True)
    stats = one.server.engine.pulse
    await one.until(lambda: stats.stats.get("prompt_tokens") == 2 and not stats.stats["num_running"])
    text = (await one.client.get("/metrics")).text
    labels = '{engine="0",model_name="tiny"}'
    assert f"vllm:prompt_tokens_total{labels} 2.0" in text and f"vllm:num_requests_running{labels} 0.0" in text
    assert f"vllm:time_to_first_token_seconds_count{labels} 2.0" in text
    assert 'vllm:request_success_total{engine="0",finished_reason="stop",model_name="tiny"} 2.0' in text
    for name in ("inter_token_latency_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert f"vllm:{name}_bucket" in text
    for name in ("num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_hits_total", "num_preemptions_total"):
        assert f"vllm:{name}{labels}" in text


@in_server()
async def test_what_is_not_there_has_the_same_shape_of_error(one: Served) -> None:
    assert error_of(await one.client.get("/v1/nothing"), 404)
    response = await one.client.get("/v1/chat/completions")
    assert error_of(response, 405) and response.headers["allow"] == "POST"
    assert error_of(await one.client.get("/debug/stats"), 404)


@in_server(debug=True)
async def test_debugging_shows_the_engine_as_it_is(one: Served) -> None:
    stats = (await one.client.get("/debug/stats")).json()
    assert stats["engine"]["pages_used"] == 0 and stats["places_taken"] == 0


@in_server()
async def test_the_document_describes_every_route(one: Served) -> None:
    made = (await one.client.get("/openapi.json")).json()
    posts = {path for path, operations in made["paths"].items() if "post" in operations}
    assert posts >= {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/tokenize"}
    assert "422" not in json.dumps(made) and "HTTPValidationError" not in json.dumps(made)
    chat = made["components"]["schemas"]["ChatRequest"]
    assert chat["additionalProperties"] is False and chat["required"] == ["messages"]
    for operations in made["paths"].values():
        for operation in operations.values():
            assert {"400", "401", "429", "503"} <= set(operation["responses"])
    assert END  # the fake's answers end


@in_server()
async def test_whole_numbers_may_be_written_with_a_point(one: Served) -> None:
    """1.0 is an integer by JSON Schema, and some languages write all numbers so."""
    body = {"prompt": [5.0, 6.0], "max_tokens": 2.0, "seed": 1.0, "stop_token_ids": [7.0]}
    assert (await one.post("/v1/completions", **body)).status_code == 200
    params = one.fake.submitted[0]["params"]
    assert (params.max_tokens, params.seed, params.stop_token_ids) == (2, 1, (7,))
    assert all(type(value) is int for value in (params.max_tokens, params.seed, *params.stop_token_ids))
    assert error_of(await one.post("/v1/completions", prompt=[5.5]), 400)["param"].startswith("prompt")
    assert error_of(await one.post("/v1/completions", prompt="x", max_tokens=1.5), 400)["param"] == "max_tokens"

"""The chat interface with a fake engine."""

from __future__ import annotations

import json
import logging
from typing import Any

from serve_fakes import END, SAYS, Served, data_objects, error_of, in_server, tokenizer


@in_server()
async def test_a_whole_answer(one: Served) -> None:
    answer = (await one.chat("Hi there", model="tiny", user="me")).json()
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": SAYS, "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    usage = answer["usage"]
    assert usage["completion_tokens"] == len(tokenizer().encode(SAYS)) + 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1}
    assert one.fake.submitted[0]["prompt"].startswith("<|im_start|>user\nHi there<|im_end|>")


@in_server()
async def test_a_stream_begins_with_the_role_and_ends_with_the_usage(one: Served) -> None:
    chunks = data_objects(await one.chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1] == "[DONE]"
    first, *middle, last, usage = chunks[:-1]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"]["content"] for c in middle) == SAYS
    assert last["choices"][0]["delta"] == {} and last["choices"][0]["finish_reason"] == "stop"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] > 5
    assert all(chunk["usage"] is None for chunk in (first, *middle, last))
    assert len({chunk["id"] for chunk in chunks[:-1]}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks[:-1])


@in_server()
async def test_without_stream_options_no_chunk_has_a_usage(one: Served) -> None:
    chunks = data_objects(await one.chat(stream=True))
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks[:-1])


@in_server()
async def test_usage_in_every_chunk(one: Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = data_objects(await one.chat(stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks[:-1]]
    assert counts == sorted(counts) and counts[-1] == counts[-2] > 3


@in_server()
async def test_several_choices_come_under_their_index(one: Served) -> None:
    answer = (await one.chat(n=3, seed=7)).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [s["params"].seed for s in one.fake.submitted] == [7, 8, 9]
    chunks = data_objects(await one.chat(n=2, stream=True))[:-1]
    for index in (0, 1):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant" and own[-1]["finish_reason"] == "stop"
        assert "".join(c["delta"].get("content", "") for c in own) == SAYS


@in_server()
async def test_logprobs_have_tokens_bytes_and_the_most_likely(one: Served) -> None:
    answer = (await one.chat(logprobs=True, top_logprobs=2)).json()
    content = answer["choices"][0]["logprobs"]["content"]
    said = b"".join(bytes(entry["bytes"]) for entry in content[:-1])
    assert said.decode() == SAYS
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert content[-1]["token"] == "<|im_end|>" and content[-1]["logprob"] == -9999.0
    chunks = data_objects(await one.chat(logprobs=True, stream=True))[:-1]
    parts = [c["choices"][0]["logprobs"] for c in chunks]
    streamed = [entry for part in parts if part for entry in part["content"]]
    assert [entry["bytes"] for entry in streamed] == [entry["bytes"] for entry in content]


@in_server()
async def test_tokens_as_ids_and_the_ids_themselves(one: Served) -> None:
    body = {"logprobs": True, "return_tokens_as_token_ids": True, "return_token_ids": True}
    answer = (await one.chat(**body)).json()
    choice = answer["choices"][0]
    assert choice["token_ids"] == [*tokenizer().encode(SAYS), END]
    assert choice["logprobs"]["content"][0]["token"] == f"token_id:{choice['token_ids'][0]}"
    assert answer["prompt_token_ids"]
    chunks = data_objects(await one.chat(stream=True, **body))[:-1]
    assert chunks[0]["prompt_token_ids"] == answer["prompt_token_ids"]
    assert [token for c in chunks for token in c["choices"][0].get("token_ids", [])] == choice["token_ids"]


@in_server()
async def test_the_engine_gets_every_field(one: Served) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "repetition_penalty": 1.1, "seed": 3, "ignore_eos": True, "min_tokens": 2, "skip_special_tokens": False,
    }  # fmt: skip
    more = {"max_completion_tokens": 9, "stop": "zzz", "stop_token_ids": [5], "logit_bias": {"7": -3}}
    await one.chat(**fields, **more, priority=3, cache_salt="s", structured_outputs={"choice": ["a", "b"]})
    got = one.fake.submitted[0]
    params = got["params"]
    assert {name: getattr(params, name) for name in fields} == fields
    assert (params.max_tokens, params.stop, params.stop_token_ids) == (9, ("zzz",), (5,))
    assert params.logit_bias == {7: -3.0}
    assert (params.structured.kind, params.structured.value) == ("choice", ("a", "b"))
    assert got["priority"] == 3 and got["cache_salt"] == "s"


@in_server()
async def test_the_default_is_the_models_own_and_the_rest_of_the_context(one: Served) -> None:
    """generation_config.json of this model samples nothing."""
    await one.chat()
    params = one.fake.submitted[0]["params"]
    assert params.temperature == 0.0 and 200 < params.max_tokens < 256
    await one.chat(top_k=-1, temperature=0.3)
    assert one.fake.submitted[1]["params"].top_k == 0


@in_server(generation_config="none")
async def test_openais_defaults(one: Served) -> None:
    await one.chat()
    assert one.fake.submitted[0]["params"].temperature == 1.0


@in_server()
async def test_response_formats(one: Served) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    await one.chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    await one.chat(response_format={"type": "json_object"})
    await one.chat(response_format={"type": "text"})
    kinds = [s["params"].structured and s["params"].structured.kind for s in one.fake.submitted]
    assert kinds == ["json_schema", "json_object", None]
    assert one.fake.submitted[0]["params"].structured.value == '{"type":"object","properties":{"a":{"type":"integer"}}}'


@in_server()
async def test_stop_texts_are_cut_and_shown_on_request(one: Served) -> None:
    cut = (await one.chat(stop=["42"])).json()["choices"][0]
    assert cut["message"]["content"] == "The answer is " and cut["stop_reason"] == "42"
    shown = (await one.chat(stop="42", include_stop_str_in_output=True)).json()["choices"][0]
    assert shown["message"]["content"] == "The answer is 42"
    chunks = data_objects(await one.chat(stop="42", include_stop_str_in_output=True, stream=True))[:-1]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "The answer is 42"


@in_server()
async def test_parts_of_text_are_joined_and_developers_are_the_system(one: Served) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
    ]
    assert (await one.post("/v1/chat/completions", messages=messages)).status_code == 200
    assert one.fake.submitted[0]["prompt"].startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert "one two<|im_end|>" in one.fake.submitted[0]["prompt"]


@in_server()
async def test_an_answer_can_be_continued(one: Served) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The answer"}]
    body = {"continue_final_message": True, "add_generation_prompt": False}
    assert (await one.post("/v1/chat/completions", messages=messages, **body)).status_code == 200
    assert one.fake.submitted[0]["prompt"].endswith("assistant\nThe answer")
    assert one.fake.submitted[0]["text_context"]


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("foo", {"foo": 1}),
    ("temperature", {"temperature": -1}),
    ("temperature", {"temperature": "1"}),
    ("top_p", {"top_p": 0}),
    ("n", {"n": 0}),
    ("logit_bias", {"logit_bias": {"99999": 1}}),
    ("logit_bias", {"logit_bias": {"x": 1}}),
    ("logit_bias", {"logit_bias": {"¹": 1}}),
    ("max_tokens", {"max_tokens": 5000}),
    ("max_tokens", {"max_tokens": 3, "max_completion_tokens": 4}),
    ("min_tokens", {"max_tokens": 3, "min_tokens": 4}),
    ("functions", {"functions": [{}]}),
    ("audio", {"audio": {"voice": "x"}}),
    ("modalities", {"modalities": ["audio"]}),
    ("store", {"store": True}),
    ("service_tier", {"service_tier": "flex"}),
    ("use_beam_search", {"use_beam_search": True}),
    ("guided_json", {"guided_json": {}}),
    ("guided_regex", {"guided_regex": "a"}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("stream_options.foo", {"stream": True, "stream_options": {"foo": True}}),
    ("top_logprobs", {"top_logprobs": 2}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
    ("logprobs", {"logprobs": 1}),
    ("prompt_logprobs", {"prompt_logprobs": 1, "stream": True}),
    ("response_format", {"response_format": {"type": "structural_tag"}}),
    ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}),
    ("structured_outputs", {"structured_outputs": {"regex": "a", "choice": ["b"]}}),
    ("structured_outputs", {"structured_outputs": {}}),
    ("structured_outputs.structural_tag", {"structured_outputs": {"structural_tag": "x"}}),
    ("chat_template_kwargs", {"chat_template_kwargs": {"no_such_switch": True}}),
    ("chat_template_kwargs", {"chat_template_kwargs": {"messages": []}}),
    ("reasoning_effort", {"reasoning_effort": "low"}),
    ("documents", {"documents": [{"text": "x"}]}),
    ("chat_template", {"chat_template": "{{ 1 }}"}),
    ("continue_final_message", {"continue_final_message": True}),
    ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    ("tool_choice", {"tool_choice": "required"}),
    ("stop", {"stop": ["x"] * 33}),
    ("stop", {"stop": "x" * 513}),
    ("stop_token_ids", {"stop_token_ids": [1] * 1025}),
    ("logit_bias", {"logit_bias": {str(i): 1 for i in range(1025)}}),
    ("timeout", {"timeout": 0}),
    ("priority", {"priority": -1}),
    ("request_id", {"request_id": "a b"}),
]


@in_server()
async def test_every_field_is_honoured_or_refused_by_name(one: Served) -> None:
    for param, body in REFUSED:
        error = error_of(await one.chat(**body), 400)
        assert error["param"] == param, (body, error)
        assert param.rpartition(".")[2] in error["message"], error
    assert one.fake.submitted == []


@in_server()
async def test_values_that_ask_for_what_is_done_anyway_are_taken(one: Served) -> None:
    neutral = {
        "store": False, "service_tier": "auto", "modalities": ["text"], "use_beam_search": False, "length_penalty": 1.0,
        "bad_words": [], "audio": None, "tool_choice": "none", "logprobs": False, "stop": None, "n": 1,
    }  # fmt: skip
    assert (await one.chat(**neutral)).status_code == 200


REFUSED_MESSAGES: list[tuple[str, list[Any]]] = [
    ("messages", []),
    ("messages[0]", [{"role": "robot", "content": "x"}]),
    ("messages[0].content[0].type", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
    ("messages[0].weight", [{"role": "user", "content": "x", "weight": 1}]),
    ("messages", [{"role": "assistant"}]),
    ("messages[0].content", [{"role": "user"}]),
    ("messages[0].content", [{"role": "user", "content": "\ud800"}]),
]


@in_server()
async def test_messages_that_are_refused(one: Served) -> None:
    headers = {"Content-Type": "application/json"}
    for param, messages in REFUSED_MESSAGES:
        raw = json.dumps({"messages": messages})
        response = await one.client.post("/v1/chat/completions", content=raw, headers=headers)
        assert error_of(response, 400)["param"].startswith(param), messages


@in_server()
async def test_a_model_that_is_not_there(one: Served) -> None:
    assert error_of(await one.chat(model="tinny"), 404)["code"] == "model_not_found"
    assert (await one.chat(model="other-name")).json()["model"] == "other-name"


@in_server()
async def test_a_request_that_fails_in_the_engine_fails_alone(one: Served) -> None:
    assert error_of(await one.chat("refuse me"), 400)["message"] == "this prompt is refused"
    assert error_of(await one.chat("break me"), 500)["type"] == "server_error"
    assert "not numbers" in error_of(await one.chat("fail later"), 500)["message"]
    assert (await one.chat("still there?")).status_code == 200


@in_server(step_s=0.05)
async def test_an_error_in_the_middle_of_a_stream_is_a_data_object(one: Served) -> None:
    chunks = data_objects(await one.chat("fail later", stream=True))
    assert chunks[-1] == "[DONE]" and chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-2]["error"]["type"] == "server_error" and "not numbers" in chunks[-2]["error"]["message"]
    assert error_of(await one.chat("refuse me", stream=True), 400)


@in_server(access_log=True)
async def test_what_clients_say_of_themselves_is_logged(one: Served) -> None:
    """In one line each, whatever they say; a path or a user with a line break wrote lines of its own."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("tunesmith.serve.app")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        await one.chat(safety_identifier="me\nFAKE", metadata={"team": "a"}, prompt_cache_key="k")
        await one.client.get("/x%0aFAKE")
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    assert "'user': 'me\\nFAKE'" in said[0] and "'team': 'a'" in said[0] and "/x\\nFAKE" in said[1]
    assert not any("\n" in line for line in said)
    assert error_of(await one.chat(user="a", safety_identifier="b"), 400)["param"] == "safety_identifier"
    assert error_of(await one.chat(metadata={"a": 1}), 400)["param"] == "metadata.a"


@in_server()
async def test_strict_schemas_are_closed(one: Served) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}

    async def ask(strict: bool | None, more: dict[str, Any]) -> Any:
        wanted = {"name": "x", "strict": strict, "schema": {**schema, **more}}
        return await one.chat(response_format={"type": "json_schema", "json_schema": wanted})

    for strict, more in ((True, {}), (True, {"additionalProperties": False}), (None, {})):
        assert (await ask(strict, more)).status_code == 200
    made = [json.loads(s["params"].structured.value) for s in one.fake.submitted]
    assert [schema.get("additionalProperties") for schema in made] == [False, False, None]
    assert error_of(await ask(True, {"additionalProperties": True}), 400)["param"] == "response_format"


@in_server()
async def test_ids_that_were_given_come_back(one: Served) -> None:
    assert (await one.chat(request_id="abc-1")).json()["id"] == "chatcmpl-abc-1"
    body = {"messages": [{"role": "user", "content": "x"}]}
    response = await one.client.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "r7"})
    assert response.json()["id"] == "chatcmpl-r7" and response.headers["x-request-id"] == "chatcmpl-r7"

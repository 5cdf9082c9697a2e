"""openai-python against a server: check.py BASE_URL MODEL API_KEY."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checks import expect, run
from openai import AsyncOpenAI, AuthenticationError, BadRequestError, NotFoundError, OpenAI

BASE_URL, MODEL, KEY = sys.argv[1:4]
client = OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
MESSAGES: list[Any] = [{"role": "user", "content": "Where is my order?"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "find_order",
        "description": "Find an order by its number.",
        "parameters": {
            "type": "object",
            "properties": {
                "number": {"type": "integer", "minimum": 0, "maximum": 9999},
                "express": {"type": "boolean"},
            },
            "required": ["number", "express"],
            "additionalProperties": False,
        },
    },
}
SCHEMA: Any = {
    "type": "object",
    "properties": {
        "size": {"type": "string", "enum": ["small", "large"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["size", "count"],
    "additionalProperties": False,
}


def chat() -> str:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=12, temperature=0)
    usage = answer.usage
    assert usage is not None
    expect(answer.choices[0].message.role == "assistant" and answer.object == "chat.completion", answer)
    expect(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage)
    expect(answer.choices[0].finish_reason in ("stop", "length"), answer)
    again = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=12, temperature=0)
    expect(again.choices[0].message.content == answer.choices[0].message.content, "greedy differs from itself")
    return repr(answer.choices[0].message.content)


def chat_stream() -> str:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    expect(chunks[0].choices[0].delta.role == "assistant", chunks[0])
    expect(chunks[-1].choices == [] and chunks[-1].usage is not None, chunks[-1])
    expect(all(chunk.usage is None for chunk in chunks[:-1]), "usage before the last chunk")
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12, temperature=0)
    expect(text == whole.choices[0].message.content, (text, whole.choices[0].message.content))
    expect([c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason], "no finish reason")
    return f"{len(chunks)} chunks"


def several_choices_and_stop() -> str:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, n=3, max_tokens=6, temperature=1.0, seed=7)
    expect([choice.index for choice in answer.choices] == [0, 1, 2], answer)
    free = client.completions.create(model=MODEL, prompt="The price is", max_tokens=16, temperature=0)
    word = free.choices[0].text[3:6]
    cut = client.completions.create(model=MODEL, prompt="The price is", max_tokens=16, temperature=0, stop=[word])
    expect(word not in cut.choices[0].text and cut.choices[0].finish_reason == "stop", cut)
    return repr(cut.choices[0].text)


def logprobs() -> str:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    found = answer.choices[0].logprobs
    assert found is not None and found.content is not None
    expect(len(found.content) == 4, found)
    for token in found.content:
        expect(len(token.top_logprobs) == 3 and token.logprob <= 0, token)
        expect(abs(token.top_logprobs[0].logprob - token.logprob) < 1e-4, "greedy is not the most likely")
        expect(bytes(token.bytes or []).decode("utf-8", "replace").startswith(token.token[:1]), token)
    return f"{[token.token for token in found.content]}"


def completions() -> str:
    answer = client.completions.create(
        model=MODEL, prompt=["A box", "A coat"], max_tokens=5, temperature=0, echo=True, logprobs=2
    )
    expect(len(answer.choices) == 2 and answer.choices[1].text.startswith("A coat"), answer)
    found = answer.choices[0].logprobs
    assert found is not None and found.token_logprobs is not None and found.tokens is not None
    expect(found.token_logprobs[0] is None and all(v is not None and v <= 0 for v in found.token_logprobs[1:]), found)
    expect(len(found.tokens) == len(found.token_logprobs) == len(found.text_offset or []), found)
    ids = client.completions.create(model=MODEL, prompt=[[5, 6, 7], [8, 9]], max_tokens=3)
    expect(len(ids.choices) == 2 and ids.usage is not None and ids.usage.prompt_tokens == 5, ids)
    return repr(answer.choices[0].text)


def tools() -> str:
    choice: Any = {"type": "function", "function": {"name": "find_order"}}
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=[TOOL], tool_choice=choice, max_tokens=64, temperature=0
    )
    calls = answer.choices[0].message.tool_calls
    assert calls
    call: Any = calls[0]
    arguments = json.loads(call.function.arguments)
    expect(isinstance(arguments["number"], int) and isinstance(arguments["express"], bool), arguments)
    back: Any = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [call.model_dump()], "content": None},
        {"role": "tool", "tool_call_id": call.id, "content": "It is on its way."},
    ]
    after = client.chat.completions.create(model=MODEL, messages=back, tools=[TOOL], tool_choice="none", max_tokens=8)
    expect(after.choices[0].message.role == "assistant" and not after.choices[0].message.tool_calls, after)
    return call.function.arguments


def tools_stream() -> str:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=64,
        temperature=0,
        stream=True,
    )
    name, text, ends = "", "", set()
    for chunk in stream:
        for choice in chunk.choices:
            ends |= {choice.finish_reason} - {None}
            for part in choice.delta.tool_calls or []:
                assert part.function is not None
                name += part.function.name or ""
                text += part.function.arguments or ""
    expect(name == "find_order" and ends == {"tool_calls"}, (name, ends))
    expect(json.loads(text).keys() == {"number", "express"}, text)
    return text


def json_schema() -> str:
    form: Any = {"type": "json_schema", "json_schema": {"name": "box", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_format=form, max_tokens=64, temperature=0.8, seed=3
    )
    found = json.loads(answer.choices[0].message.content or "")
    expect(found["size"] in ("small", "large") and isinstance(found["count"], int), found)
    return str(found)


def json_object() -> str:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=200, temperature=0
    )
    content = answer.choices[0].message.content or ""
    if answer.choices[0].finish_reason == "stop":
        expect(isinstance(json.loads(content), dict), content)
    expect(content.lstrip().startswith("{"), content)
    return content[:80]


def parsed() -> str:
    from pydantic import BaseModel

    class Box(BaseModel):
        size: str
        heavy: bool

    answer = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Box, max_tokens=120)
    box = answer.choices[0].message.parsed
    expect(isinstance(box, Box), answer)
    return str(box)[:80]


def embeddings() -> str:
    answer = client.embeddings.create(model=MODEL, input=["a red coat", "a red coat", "parcel lost"])
    first, same, other = (item.embedding for item in answer.data)
    expect(abs(math.sqrt(sum(v * v for v in first)) - 1) < 1e-3, "not of length 1")
    cosine = sum(a * b for a, b in zip(first, other, strict=True))
    expect(max(abs(a - b) for a, b in zip(first, same, strict=True)) < 1e-4 and cosine < 0.9999, cosine)
    return f"{len(first)} numbers, cosine {cosine:.3f}"


def responses() -> str:
    answer = client.responses.create(model=MODEL, input="Where is my order?", max_output_tokens=16, temperature=0)
    expect(answer.output_text is not None and answer.usage is not None, answer)
    events = list(
        client.responses.create(model=MODEL, input="Where is it?", max_output_tokens=16, temperature=0, stream=True)
    )
    kinds = [event.type for event in events]
    expect(kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete"), kinds)
    return f"{answer.status}, {len(kinds)} events"


def models() -> str:
    listed = client.models.list()
    expect(MODEL in [model.id for model in listed], listed)
    expect(client.models.retrieve(MODEL).id == MODEL, "retrieve")
    return str(len(listed.data))


def errors() -> str:
    def refused(kind: type[Exception], **changes: Any) -> str:
        arguments: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4, **changes}
        try:
            client.chat.completions.create(**arguments)
        except kind as error:
            return str(error)
        raise AssertionError(f"{changes} was accepted")

    said = refused(BadRequestError, temperature=-1)
    expect("temperature" in said, said)
    unknown = refused(BadRequestError, extra_body={"temprature": 1})
    expect("temprature" in unknown, unknown)
    refused(BadRequestError, messages=[])
    refused(NotFoundError, model="no-such-model")
    long: Any = [{"role": "user", "content": "word " * 20000}]
    refused(BadRequestError, messages=long)
    return said[:100]


def wrong_key() -> str:
    if KEY == "none":
        return "the server asks for none"
    try:
        OpenAI(base_url=BASE_URL, api_key="wrong", max_retries=0).models.list()
    except AuthenticationError as error:
        return str(error)[:80]
    raise AssertionError("a wrong key was accepted")


def unicode_stream() -> str:
    """Every piece is whole characters: none is the replacement character at a cut."""
    ids = list(range(20, 400, 7))
    stream = client.completions.create(model=MODEL, prompt=ids, max_tokens=120, temperature=1.5, seed=1, stream=True)
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    whole = client.completions.create(model=MODEL, prompt=ids, max_tokens=120, temperature=1.5, seed=1)
    expect("".join(pieces) == whole.choices[0].text, "the stream's text differs from the whole answer's")
    return f"{len(pieces)} pieces"


def asynchronous() -> str:
    async def main() -> list[str]:
        async with AsyncOpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0) as many:

            async def one(number: int) -> str:
                text = ""
                stream = await many.chat.completions.create(
                    model=MODEL,
                    messages=[{"role": "user", "content": f"Order {number}?"}],
                    max_tokens=8,
                    temperature=0,
                    stream=True,
                )
                async for chunk in stream:
                    text += chunk.choices[0].delta.content or "" if chunk.choices else ""
                return text

            return list(await asyncio.gather(*(one(number) for number in range(12))))

    answers = asyncio.run(main())
    alone = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Order 3?"}], max_tokens=8, temperature=0
    )
    expect(len(answers) == 12 and all(answers), answers)
    # Without the batch-invariant mode a near tie may fall otherwise in a batch: said, not demanded.
    return f"12 at once; the same alone: {answers[3] == alone.choices[0].message.content}"


def abandoned_stream() -> str:
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=400, stream=True)
    next(iter(stream))
    stream.close()
    return chat()


if __name__ == "__main__":
    run(
        {
            "models": models,
            "chat": chat,
            "chat, streamed": chat_stream,
            "async, 12 streams": asynchronous,
            "n and stop": several_choices_and_stop,
            "logprobs": logprobs,
            "completions: lists, echo, logprobs, token ids": completions,
            "tools": tools,
            "tools, streamed": tools_stream,
            "JSON schema": json_schema,
            "JSON object": json_object,
            "parsed into pydantic": parsed,
            "embeddings": embeddings,
            "responses": responses,
            "a stream is whole characters": unicode_stream,
            "errors": errors,
            "a wrong key": wrong_key,
            "a stream that is left": abandoned_stream,
        }
    )

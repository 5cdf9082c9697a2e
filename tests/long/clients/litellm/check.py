"""LiteLLM against a server: check.py BASE_URL MODEL API_KEY."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # its table of prices is not looked for on the network
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import litellm
from checks import expect, run

BASE_URL, MODEL, KEY = sys.argv[1:4]
ASK = [{"role": "system", "content": "You help customers."}, {"role": "user", "content": "Where is my order?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "find_order",
        "description": "Find an order by its number.",
        "strict": True,
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
CHOICE = {"type": "function", "function": {"name": "find_order"}}
BOX = {
    "type": "object",
    "properties": {"size": {"enum": ["small", "large"]}, "ok": {"type": "boolean"}},
    "required": ["size", "ok"],
    "additionalProperties": False,
}


def settings(**changes: Any) -> dict[str, Any]:
    fixed = {"model": f"hosted_vllm/{MODEL}", "api_base": BASE_URL, "api_key": KEY, "num_retries": 0}
    return {**fixed, "messages": ASK, "max_tokens": 16, "temperature": 0, **changes}


def ask(**changes: Any) -> Any:
    return litellm.completion(**settings(**changes))


def whole() -> str:
    answer = ask()
    expect(answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens, answer.usage)
    expect(answer.choices[0].message.content and answer.choices[0].finish_reason in ("stop", "length"), answer)
    return repr(answer.choices[0].message.content)


def as_openai() -> str:
    """The other way that its users name such a server."""
    answer = ask(model=f"openai/{MODEL}")
    expect(answer.choices[0].message.content == ask().choices[0].message.content, answer)
    return repr(answer.choices[0].message.content)


def stream() -> str:
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    built = litellm.stream_chunk_builder(chunks, messages=ASK)
    plain = ask()
    expect(built.choices[0].message.content == plain.choices[0].message.content, built)
    expect(chunks[0].choices[0].delta.role == "assistant", chunks[0])
    ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    expect(ends == [plain.choices[0].finish_reason], ends)
    expect(built.usage.completion_tokens == plain.usage.completion_tokens, (built.usage, plain.usage))
    return f"{len(chunks)} chunks"


def asynchronous() -> str:
    async def main() -> list[Any]:
        asked = (litellm.acompletion(**settings(messages=[{"role": "user", "content": f"{i}?"}])) for i in range(6))
        return list(await asyncio.gather(*asked))

    answers = asyncio.run(main())
    expect(len(answers) == 6 and all(answer.usage.completion_tokens > 0 for answer in answers), answers)
    return f"{len(answers)} answers"


def asynchronous_stream() -> str:
    async def main() -> str:
        chunks = await litellm.acompletion(**settings(stream=True))
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    text = asyncio.run(main())
    expect(text == ask().choices[0].message.content, text)
    return repr(text)


def tools() -> str:
    answer = ask(max_tokens=64, tools=[TOOL], tool_choice=CHOICE)
    (call,) = answer.choices[0].message.tool_calls
    said = json.loads(call.function.arguments)
    expect(call.function.name == "find_order" and isinstance(said["number"], int), call)
    back = {"role": "tool", "tool_call_id": call.id, "content": "it is on its way"}
    after = ask(messages=[*ASK, answer.choices[0].message, back], tools=[TOOL])
    expect(after.choices[0].message.content is not None or after.choices[0].message.tool_calls, after)
    return str(said)


def tools_streamed() -> str:
    chunks = list(ask(max_tokens=64, tools=[TOOL], tool_choice=CHOICE, stream=True))
    (call,) = litellm.stream_chunk_builder(chunks, messages=ASK).choices[0].message.tool_calls
    plain = ask(max_tokens=64, tools=[TOOL], tool_choice=CHOICE).choices[0].message.tool_calls[0]
    expect(call.function.name == "find_order" and call.function.arguments == plain.function.arguments, call)
    return str(json.loads(call.function.arguments))


def json_schema() -> str:
    wanted = {"type": "json_schema", "json_schema": {"name": "box", "strict": True, "schema": BOX}}
    found = json.loads(ask(max_tokens=64, response_format=wanted).choices[0].message.content)
    expect(found["size"] in ("small", "large") and isinstance(found["ok"], bool), found)
    return str(found)


def text_completion() -> str:
    asked = {"model": f"text-completion-openai/{MODEL}", "api_base": BASE_URL, "api_key": KEY, "temperature": 0}
    answer = litellm.text_completion(prompt="Once upon a time", max_tokens=8, **asked)
    streamed = litellm.text_completion(prompt="Once upon a time", max_tokens=8, stream=True, **asked)
    text = "".join(chunk.choices[0].text or "" for chunk in streamed)
    expect(text == answer.choices[0].text and text, (text, answer))
    return repr(text)


def embedding() -> str:
    asked = {"model": f"hosted_vllm/{MODEL}", "api_base": BASE_URL, "api_key": KEY}
    found = litellm.embedding(input=["a red coat", "parcel lost"], **asked).data
    expect(len(found) == 2 and len(found[0]["embedding"]) == len(found[1]["embedding"]) > 10, found)
    return f"{len(found[0]['embedding'])} numbers"


def errors() -> str:
    """Each mistake is the exception that LiteLLM's routing and retries go by."""
    try:
        ask(api_key="wrong")
        raise AssertionError("a wrong key was taken")
    except litellm.AuthenticationError:
        pass
    try:
        ask(messages=[{"role": "user", "content": "word " * 9000}])
        raise AssertionError("a prompt longer than the context was taken")
    except litellm.ContextWindowExceededError as error:
        return type(error).__name__


if __name__ == "__main__":
    run(
        {
            "completion": whole,
            "completion, as an openai/ model": as_openai,
            "completion, streamed, with usage": stream,
            "acompletion, 6 at once": asynchronous,
            "acompletion, streamed": asynchronous_stream,
            "tools": tools,
            "tools, streamed": tools_streamed,
            "JSON schema": json_schema,
            "text completion, whole and streamed": text_completion,
            "embedding": embedding,
            "errors": errors,
        }
    )

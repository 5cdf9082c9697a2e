"""LangChain's ChatOpenAI against a server: check.py BASE_URL MODEL API_KEY."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checks import expect, run
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

BASE_URL, MODEL, KEY = sys.argv[1:4]
ASK = [SystemMessage("You help customers."), HumanMessage("Where is my order?")]


def chat(**changes: Any) -> ChatOpenAI:
    settings: dict[str, Any] = {"max_tokens": 16, "temperature": 0, "max_retries": 0, **changes}
    return ChatOpenAI(model=MODEL, base_url=BASE_URL, api_key=KEY, **settings)


@tool
def find_order(number: Annotated[int, Field(ge=0, le=9999)], express: bool) -> str:
    """Find an order by its number."""
    return f"order {number} {express}"


class Box(BaseModel):
    """A box."""

    size: Literal["small", "large"]
    count: int = Field(ge=0, le=99)


def invoke() -> str:
    answer = chat().invoke(ASK)
    usage = answer.usage_metadata
    expect(usage is not None and usage["output_tokens"] > 0, answer)
    return repr(answer.content)


def stream() -> str:
    chunks = list(chat(stream_usage=True).stream(ASK))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    expect(whole.content == chat().invoke(ASK).content, whole)
    expect(whole.usage_metadata is not None, "no usage")
    return f"{len(chunks)} chunks"


def batch() -> str:
    answers = chat().batch([f"Order {number}?" for number in range(6)])
    expect(len(answers) == 6, answers)
    return str(len(answers))


def asynchronous() -> str:
    answers = asyncio.run(chat().abatch([f"Order {number}?" for number in range(6)]))
    expect(len(answers) == 6, answers)
    return str(len(answers))


def tools() -> str:
    asking = chat(max_tokens=64).bind_tools([find_order], tool_choice="find_order", strict=True)
    answer = asking.invoke(ASK)
    (call,) = answer.tool_calls
    expect(call["name"] == "find_order" and isinstance(call["args"]["number"], int), call)
    back = ToolMessage(find_order.invoke(call["args"]), tool_call_id=call["id"])
    after = chat().bind_tools([find_order], tool_choice="none").invoke([*ASK, answer, back])
    expect(isinstance(after.content, str), after)
    return str(call["args"])


def structured() -> str:
    found = chat(max_tokens=64).with_structured_output(Box, method="json_schema").invoke(ASK)
    expect(isinstance(found, Box), found)
    return str(found)


def structured_by_tool() -> str:
    found = chat(max_tokens=64).with_structured_output(Box, method="function_calling", strict=True).invoke(ASK)
    expect(isinstance(found, Box), found)
    return str(found)


def logprobs() -> str:
    answer = chat(max_tokens=4).bind(logprobs=True, top_logprobs=2).invoke(ASK)
    found = answer.response_metadata["logprobs"]["content"]
    expect(len(found) == 4 and len(found[0]["top_logprobs"]) == 2, found)
    return str([entry["token"] for entry in found])


def embeddings() -> str:
    model = OpenAIEmbeddings(model=MODEL, base_url=BASE_URL, api_key=KEY, check_embedding_ctx_length=False)
    found = model.embed_documents(["a red coat", "parcel lost"])
    expect(len(found) == 2 and len(found[0]) == len(found[1]) > 10, found)
    return f"{len(found[0])} numbers"


if __name__ == "__main__":
    run(
        {
            "invoke": invoke,
            "stream with usage": stream,
            "batch": batch,
            "async batch": asynchronous,
            "tools": tools,
            "structured output by JSON schema": structured,
            "structured output by a tool": structured_by_tool,
            "logprobs": logprobs,
            "embeddings": embeddings,
        }
    )

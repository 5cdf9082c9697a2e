"""Tools and thoughts on their way between the chat interface and `tools`: OpenAI's fields in, OpenAI's fields out."""

from __future__ import annotations

from typing import Any

from tunesmith.engine.request import StructuredSpec
from tunesmith.errors import RequestError
from tunesmith.serve.errors import bad_field
from tunesmith.serve.schema.chat import ChatRequest
from tunesmith.serve.text import ServedText
from tunesmith.serve.tool_parsers import Delta, ToolCallDelta, join_deltas
from tunesmith.serve.tools import AnswerPlan, plan_answer, template_tools


def tools_of(body: ChatRequest) -> list[dict[str, Any]] | None:
    """The request's tools as plain data."""
    return None if body.tools is None else [tool.model_dump(exclude_none=True) for tool in body.tools]


def choice_of(body: ChatRequest) -> Any:
    """`tool_choice` as plain data."""
    choice = body.tool_choice
    return choice if choice is None or isinstance(choice, str) else choice.model_dump()


def shown_tools(body: ChatRequest) -> dict[str, Any]:
    """The template's `tools`, where there are any to show."""
    shown = template_tools(tools_of(body), choice_of(body))
    return {"tools": shown} if shown else {}


def make_plan(body: ChatRequest, text: ServedText, prompt: str, structured: StructuredSpec | None) -> AnswerPlan | None:
    """How the answer is held to its form and read; None where it is text and nothing else.

    Raises: ApiError (400) where the model's template knows no tools, or the choice names none of them.
    """
    uses_tools = bool(body.tools) and body.tool_choice != "none"
    if not uses_tools and text.format.reasoning is None:
        return None
    try:
        return plan_answer(
            text.format, text.tokenizer, prompt, tools=tools_of(body), tool_choice=choice_of(body),
            parallel_tool_calls=body.parallel_tool_calls, structured=structured,
        )  # fmt: skip
    except RequestError as error:
        raise bad_field("tool_choice" if str(error).startswith("tool_choice") else "tools", str(error)) from None


def message_of(plan: AnswerPlan, text: str, reason: str) -> tuple[dict[str, Any], str]:
    """A whole answer's message, and why it ended."""
    parser = plan.parser()
    said = join_deltas([*parser.feed(text), *parser.finish()])
    message: dict[str, Any] = {"role": "assistant", "content": said.content, "refusal": None}
    if said.reasoning is not None:
        message["reasoning_content"] = said.reasoning
    if said.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in said.tool_calls
        ]
    return message, plan.finish_reason(parser, reason)


def change_of(delta: Delta) -> dict[str, Any]:
    """What a chunk says of a delta."""
    if delta.tool_call is not None:
        return {"tool_calls": [_call_delta(delta.tool_call)]}
    return {"reasoning_content": delta.reasoning} if delta.reasoning else {"content": delta.content}


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    """The first part of a call has its id, type and name; the others only arguments."""
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}

"""The switches that a request's chat template is called with, beside the messages."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tunesmith.errors import RequestError
from tunesmith.serve.errors import ApiError, bad_field, unsupported
from tunesmith.serve.schema.chat import ChatMessage, ChatRequest
from tunesmith.serve.text import ServedText
from tunesmith.serve.tools import template_messages

# Set by the server itself, or by fields of their own.
_RESERVED = (
    "messages", "add_generation_prompt", "continue_final_message", "tools", "documents", "chat_template", "now",
    "raise_exception", "strftime_now",
)  # fmt: skip


def plain_messages(messages: Sequence[ChatMessage], text: ServedText, param: str = "messages") -> list[dict[str, Any]]:
    """The messages as the template reads them.

    Raises: ApiError (400) for calls whose arguments are no JSON, and for what the template would not show.
    """
    given = [message.model_dump(exclude_none=True) for message in messages]
    called: set[str] = set()
    for index, message in enumerate(given):
        _check_shown(message, called, f"{param}[{index}]", text)
        called |= {call["function"]["name"] for call in message.get("tool_calls") or ()}
    try:
        return template_messages(given, text.tokenizer)
    except RequestError as error:
        raise bad_field(param, str(error)) from None


def _check_shown(message: dict[str, Any], called: Collection[str], place: str, text: ServedText) -> None:
    """Raises: ApiError (400) for calls, results, names and thoughts that the template would drop in silence.

    Args: called: functions that were called before; a tool's result may repeat such a name.
    """
    role = "system" if message["role"] == "developer" else str(message["role"])
    if role == "tool" and not text.words.shows("tool", "content"):
        raise _not_shown(f"{place}.role", "results of tools")
    if message.get("tool_calls") and not text.words.shows("assistant", "tool_calls"):
        raise _not_shown(f"{place}.tool_calls", "tool calls")
    name = message.get("name")
    is_known = name is None or (role == "tool" and name in called)
    if not is_known and not text.words.shows(role, "name"):
        raise _not_shown(f"{place}.name", f"names of a {role}")
    thought = next((key for key in ("reasoning_content", "reasoning") if message.get(key)), None)
    # Where thoughts are this server's own words they come back with each turn; what the template does with them is its.
    if thought and text.format.reasoning is None and not text.words.shows("assistant", "reasoning_content"):
        raise _not_shown(f"{place}.{thought}", "thoughts")


def _not_shown(param: str, what: str) -> ApiError:
    return unsupported(param, f"{param}: this model's chat template doesn't show {what} to the model: leave it out")


def template_switches(body: ChatRequest, text: ServedText) -> dict[str, Any]:
    """What the template is called with beside the messages.

    Raises: ApiError (400) for a switch that the template doesn't read: it would be dropped in silence.
    """
    given: dict[str, Any] = dict(body.chat_template_kwargs or {})
    check_switches(text, given)
    for name in ("documents", "reasoning_effort"):
        value = getattr(body, name)
        if value is not None:
            check_switch(text, name, name)
            given[name] = value
    if body.add_special_tokens:
        raise unsupported("add_special_tokens", "add_special_tokens: the template writes the special tokens itself")
    if body.add_generation_prompt is False:
        given["add_generation_prompt"] = False
    return given


def check_switches(text: ServedText, given: Mapping[str, Any]) -> None:
    """Raises: ApiError (400) for chat_template_kwargs that the template doesn't read, or that are the server's own."""
    for name in given:
        if name in _RESERVED:
            raise unsupported("chat_template_kwargs", f"chat_template_kwargs can't set {name!r}")
        check_switch(text, name, "chat_template_kwargs")


def check_switch(text: ServedText, name: str, param: str) -> None:
    """Raises: ApiError (400) where the chat template takes no such variable."""
    if name not in text.words.variables:
        raise unsupported(
            param, f"{param}: this model's chat template knows no {name[:64]!r}, so it would change nothing"
        )

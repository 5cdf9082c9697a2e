"""The switches that a request's chat template is called with, beside the messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunesmith.errors import RequestError
from tunesmith.serve.errors import bad_field, unsupported
from tunesmith.serve.schema.chat import ChatMessage, ChatRequest
from tunesmith.serve.text import ServedText
from tunesmith.serve.tools import template_messages

# Set by the server itself, or by fields of their own.
_RESERVED = (
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "tools",
    "documents",
    "chat_template",
    "now",
)


def plain_messages(messages: Sequence[ChatMessage], text: ServedText, param: str = "messages") -> list[dict[str, Any]]:
    """The messages as the template reads them. Raises: ApiError (400) for calls whose arguments are no JSON."""
    try:
        return template_messages([message.model_dump(exclude_none=True) for message in messages], text.tokenizer)
    except RequestError as error:
        raise bad_field(param, str(error)) from None


def template_switches(body: ChatRequest, text: ServedText) -> dict[str, Any]:
    """What the template is called with beside the messages.

    Raises: ApiError (400) for a switch that the template doesn't read: it would be dropped in silence.
    """
    given: dict[str, Any] = dict(body.chat_template_kwargs or {})
    for name in given:
        if name in _RESERVED:
            raise unsupported("chat_template_kwargs", f"chat_template_kwargs can't set {name!r}")
        check_switch(text, name, "chat_template_kwargs")
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


def check_switch(text: ServedText, name: str, param: str) -> None:
    """Raises: ApiError (400) where the chat template has no such word."""
    if not text.template_reads(name):
        raise unsupported(
            param, f"{param}: this model's chat template knows no {name[:64]!r}, so it would change nothing"
        )

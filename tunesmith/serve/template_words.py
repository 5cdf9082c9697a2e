"""What a chat template reads of a request: found in the template itself, so that nothing is dropped in silence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from tunesmith.errors import TunesmithError
from tunesmith.text.chat import render
from tunesmith.text.tokenizer import Tokenizer

_MARK = "zqjxkv"
# As long as Mistral's templates want it, and of letters and digits only.
_CALL_ID = "zqjxkvabc"
_SEEN_CHARACTERS = 64


class _Generation(Extension):
    """`{% generation %}` blocks, which mark what is trained."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body."""
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


@lru_cache(maxsize=32)
def template_variables(template: str) -> frozenset[str]:
    """The variables that a template takes from outside; none of a template that is broken."""
    environment = jinja2.Environment(extensions=[_Generation, loopcontrols])
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(template)))
    except (jinja2.TemplateError, RecursionError):
        return frozenset()


class TemplateWords:
    """Which fields of messages the template of a tokenizer shows, tried out on small conversations."""

    def __init__(self, tokenizer: Tokenizer, arguments: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.arguments = {k: v for k, v in arguments.items() if k != "add_generation_prompt"}
        self.variables = template_variables(tokenizer.chat_template or "")
        self.shows = lru_cache(maxsize=64)(self._shows)

    def _shows(self, role: str, field: str) -> bool:
        """Whether a message's field is seen in the text; also where the template refuses to say (it will again)."""
        try:
            text = render(self.tokenizer, _trial(role, field), add_generation_prompt=False, **self.arguments)
        except TunesmithError:
            return True
        return _MARK in text


def _trial(role: str, field: str) -> list[dict[str, Any]]:
    """A conversation in which the mark stands in one place."""
    function = {"name": _MARK if (role, field) == ("assistant", "tool_calls") else "f", "arguments": {}}
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": _CALL_ID, "type": "function", "function": function}],
    }
    said: dict[str, dict[str, Any]] = {
        "system": {"role": "system", "content": "a"},
        "user": {"role": "user", "content": "b"},
        "assistant": call if field == "tool_calls" else {"role": "assistant", "content": "c"},
        "tool": {"role": "tool", "content": "d", "tool_call_id": _CALL_ID},
    }
    if field != "tool_calls":
        said[role][field] = _MARK
    order = {"system": ("system", "user"), "user": ("user",), "assistant": ("user", "assistant")}
    if role == "tool":
        return [said["user"], call, said["tool"]]
    return [said[name] for name in order[role]]


def dropped_message(messages: Sequence[Mapping[str, Any]], text: str) -> int | None:
    """The first message of a system or a user that is not in the rendered text; None where all are.

    Templates may trim and move them, so a message counts as shown where its first line begins as it should.
    """
    at = 0
    for index, message in enumerate(messages):
        lines = str(message.get("content") or "").strip().splitlines()
        if not lines or message["role"] not in ("system", "user"):
            continue
        seen = lines[0].strip()[:_SEEN_CHARACTERS]
        found = text.find(seen, at)
        if found < 0 and (found := text.find(seen)) < 0:
            return index
        at = found
    return None

"""The sections of an answer that hold tool calls, one reader for each family's way of writing them."""

from __future__ import annotations

import ast
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from tunesmith.serve.json_call import JsonCall


@dataclass(frozen=True)
class ToolSyntax:
    """How a family of models writes tool calls.

    begin, end: tags around a call or a list of calls; "" where there is nothing.
    marks: other tags, which must reach the parser too.
    """

    name: str
    begin: str
    end: str = ""
    marks: tuple[str, ...] = ()

    @property
    def tags(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(tag for tag in (self.begin, self.end, *self.marks) if tag)


SYNTAXES = {
    "hermes": ToolSyntax("hermes", "<tool_call>", "</tool_call>"),
    "llama3": ToolSyntax("llama3", "<|python_tag|>"),
    "mistral": ToolSyntax("mistral", "[TOOL_CALLS]"),
    "mistral-args": ToolSyntax("mistral-args", "[TOOL_CALLS]", marks=("[ARGS]", "[CALL_ID]")),
    "deepseek": ToolSyntax(
        "deepseek", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>",
        marks=("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    ),
}  # fmt: skip


class Section(Protocol):
    """Where calls are: everything between a begin tag and its end.

    Once `is_closed`, `rest` is what follows, and `refused` the text (tag and all) that was no call.
    """

    calls: list[JsonCall]
    is_closed: bool
    rest: str
    refused: str

    def push(self, text: str) -> None:
        """Read on."""

    def finish(self) -> None:
        """The answer has ended."""


def open_section(syntax: ToolSyntax, names: Collection[str], *, tagged: bool) -> Section:
    """The reader of what follows a begin tag (`tagged`), or of an answer that begins with a brace."""
    if syntax.name == "llama3":
        return _Bare(syntax, syntax.begin if tagged else "", names)
    return {"hermes": _Tagged, "deepseek": _Fenced}.get(syntax.name, _List)(syntax, syntax.begin)


class _Reader:
    """What the sections share. `_raw` is all that was read, tag and all; `_text` what is still to be looked at."""

    def __init__(self, syntax: ToolSyntax, tag: str) -> None:
        self.syntax = syntax
        self.calls: list[JsonCall] = []
        self.is_closed, self.rest, self.refused = False, "", ""
        self._raw, self._text = tag, ""

    def push(self, text: str) -> None:
        """Read on."""
        self._raw += text
        self._text += text
        while self._text and not self.is_closed and self._step():
            pass

    def _step(self) -> bool:
        """Whether there is more to do with the text there is."""
        call = self.calls[-1] if self.calls else None
        if call is None or call.is_done or call.is_broken:
            return self._between()
        self._text = call.push(self._text)
        if call.is_broken and not call.has_begun:
            self._drop_call()
        return True

    def _between(self) -> bool:
        """Go on outside of a call."""
        raise AssertionError

    def _drop_call(self) -> None:
        """What was being read was no call: it is text."""
        call = self.calls.pop()
        self._close(self._text)
        self.refused = self.refused or call.raw

    def _close(self, rest: str) -> None:
        """The section ends before `rest`. Without a call it was none."""
        self.is_closed, self.rest, self._text = True, rest, ""
        if not self.calls:
            self.refused = self._raw.removesuffix(rest)

    def finish(self) -> None:
        """The answer has ended."""
        if self.is_closed:
            return
        if self.calls and not self.calls[-1].has_begun:
            self._drop_call()
        else:
            self._close("")


class _Tagged(_Reader):
    """`<tool_call>{...}</tool_call>`: one call. The end tag may be missing."""

    def _between(self) -> bool:
        if not self.calls:
            self.calls.append(JsonCall())
            return True
        at = self._text.find(self.syntax.end)
        if at >= 0:
            self._close(self._text[at + len(self.syntax.end) :])
        elif self.calls[0].is_done and not self.syntax.end.startswith(self._text.strip()):
            self._close(self._text)
        return False


class _List(_Reader):
    """`[TOOL_CALLS][{...}, {...}]`, or `[TOOL_CALLS]name[ARGS]{...}` with a tag before every call."""

    def __init__(self, syntax: ToolSyntax, tag: str) -> None:
        super().__init__(syntax, tag)
        self._in_list, self._after_tag = False, True

    def _between(self) -> bool:
        text = self._text.lstrip()
        if not text or (not self._in_list and text != self.syntax.begin and self.syntax.begin.startswith(text)):
            return False
        if text.startswith(self.syntax.begin):
            self._text, self._after_tag = text[len(self.syntax.begin) :], True
        elif text[0] == "{":
            self.calls.append(JsonCall())
            self._text = text
        elif self._in_list and text[0] == ",":
            self._text = text[1:]
        elif self._in_list and text[0] == "]":
            self._close(text[1:])
        elif self._in_list or not self._after_tag:
            self._close(text)
        elif text[0] == "[":
            self._in_list, self._text = True, text[1:]
        else:
            return self._named(text)
        return True

    def _named(self, text: str) -> bool:
        """`name[ARGS]{`; a call's id may stand between."""
        head, brace, _ = text.partition("{")
        if "\n" in head or len(head) > 512:
            self._close("")
            return False
        if not brace:
            return False
        name = head.split("[")[0].strip()
        if not name:
            self._close("")
            return False
        self.calls.append(JsonCall(name))
        self._text, self._after_tag = text[len(head) :], False
        return True


class _Fenced(_Reader):
    """DeepSeek's: each call between tags of its own, its arguments in a fenced block or bare."""

    def _between(self) -> bool:
        start, sep, _ = self.syntax.marks
        end, begin = self._text.find(self.syntax.end), self._text.find(start)
        if end >= 0 and not 0 <= begin < end:
            self._close(self._text[end + len(self.syntax.end) :])
            return True
        at = self._text.find("{", begin) if begin >= 0 else -1
        head = self._text[begin + len(start) : at]
        if at < 0 or sep not in head:
            return False
        kind, _, after = head.partition(sep)
        self.calls.append(JsonCall(after.replace("```json", "").strip() or kind.strip()))
        self._text = self._text[at:]
        return True


class _Bare(_Reader):
    """Llama's: `{"name": ..., "parameters": ...}` as the whole answer, or after a tag; there also `name.call(...)`.

    An answer that happens to be JSON is no call: the name must be a tool's.
    """

    def __init__(self, syntax: ToolSyntax, tag: str, names: Collection[str]) -> None:
        super().__init__(syntax, tag)
        self._tag, self._names = tag, names

    def _between(self) -> bool:
        text = self._text.lstrip(" \n\r\t;" if self.calls else " \n\r\t")
        if not text:
            return False
        if text[0] == "{":
            self.calls.append(JsonCall(allowed=self._names))
            self._text = text
            return True
        if self.calls or not self._tag:
            self._close(text)
        return False

    def finish(self) -> None:
        """The answer has ended: only now a call in Python's notation is whole."""
        if not self.is_closed and not self.calls and self._tag:
            call = _dotted(self._text, self._names)
            self.calls += [] if call is None else [call]
        super().finish()


def _dotted(text: str, names: Collection[str]) -> JsonCall | None:
    """`brave_search.call(query="...")`: a built-in tool's call, its arguments literals by name."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if not isinstance(tree, ast.Call) or tree.args or not isinstance(tree.func, ast.Attribute):
            return None
        owner = tree.func.value
        if tree.func.attr != "call" or not isinstance(owner, ast.Name) or owner.id not in names:
            return None
        arguments = {str(k.arg): ast.literal_eval(k.value) for k in tree.keywords if k.arg is not None}
        call = JsonCall(owner.id)
        call.push(json.dumps(arguments, ensure_ascii=False))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return call

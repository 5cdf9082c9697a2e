"""Answers taken apart as they come: thoughts, text for the person, and tool calls, whichever way the model writes them.

    begin --<think>--> thought --</think>--> content --a tag--> a section of calls --its end--> content ...

Nothing that may still turn out to be a part of a tag is given out. A call's arguments are given out as they come, once
its name is known; what only looked like a call is given out as text.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from tunesmith.serve.tool_sections import Section, ToolSyntax, open_section

_ID_LETTERS = string.ascii_letters + string.digits
_BLANKS = " \n\r\t"


@dataclass(frozen=True)
class ToolCallDelta:
    """A part of a tool call. `id` and `name` come once, with the first part; `arguments` is JSON text to be joined."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Delta:
    """What is new: one of the three."""

    content: str = ""
    reasoning: str = ""
    tool_call: ToolCallDelta | None = None


@dataclass(frozen=True)
class ToolCall:
    """A whole call; `arguments` is JSON as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ParsedAnswer:
    """A whole answer; None where there is nothing of the kind."""

    content: str | None
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]


@dataclass(frozen=True)
class ReasoningSyntax:
    """What stands around a thought."""

    name: str
    begin: str
    end: str


REASONINGS = {"think": ReasoningSyntax("think", "<think>", "</think>")}


class AnswerParser:
    """One answer. Pieces in, deltas out; joined they say the same, however the answer was cut into pieces.

    Args:
        tools: how calls are written; None: nothing is a call.
        names: the tools there are.
        reasoning: what stands around a thought; None: a thought is text like any other.
        in_thought: the prompt has already opened a thought.
        max_calls: further calls are left out (parallel_tool_calls: false).
    """

    def __init__(
        self,
        tools: ToolSyntax | None = None,
        names: Collection[str] = (),
        *,
        reasoning: ReasoningSyntax | None = None,
        in_thought: bool = False,
        max_calls: int | None = None,
        make_id: Callable[[], str] | None = None,
    ) -> None:
        self.tools, self.names, self.reasoning = tools, frozenset(names), reasoning
        self.max_calls = max_calls
        self.num_calls = 0
        self._make_id = make_id or _id_maker(tools)
        self._read: Callable[[list[Delta], bool], bool] = self._read_content
        if reasoning is not None:
            self._read = self._read_thought if in_thought else self._read_beginning
        self._held = ""
        # Blanks that are dropped at the start of what comes next, and whether anything was said as content.
        self._strips, self._has_said = "\n" if in_thought else "", False
        # Blanks before a tag: they are dropped with the calls, and stay where there were none.
        self._blanks = ""
        self._section: Section | None = None
        self._given: list[int] = []

    @property
    def has_calls(self) -> bool:
        """Whether the answer called a tool: the finish_reason "stop" is then "tool_calls"."""
        return self.num_calls > 0

    def feed(self, piece: str) -> list[Delta]:
        """What a piece of the answer's text makes known."""
        self._held += piece
        return self._run(at_end=False)

    def finish(self) -> list[Delta]:
        """What was held back, at the end of the answer."""
        return self._run(at_end=True)

    def _run(self, at_end: bool) -> list[Delta]:
        deltas: list[Delta] = []
        while self._read(deltas, at_end):
            pass
        return deltas

    def _enter(self, read: Callable[[list[Delta], bool], bool], held: str, strips: str = "") -> bool:
        self._read, self._held, self._strips = read, held, strips
        return True

    def _read_beginning(self, deltas: list[Delta], at_end: bool) -> bool:
        """Whether the answer begins with a thought."""
        assert self.reasoning is not None
        start, tag = self._held.lstrip(_BLANKS), self.reasoning.begin
        if start.startswith(tag):
            return self._enter(self._read_thought, start[len(tag) :], "\n")
        if tag.startswith(start) and not at_end:
            return False
        return self._enter(self._read_content, self._held)

    def _read_thought(self, deltas: list[Delta], at_end: bool) -> bool:
        assert self.reasoning is not None
        text, tag = self._held.lstrip(self._strips) if self._strips else self._held, self.reasoning.end
        at = text.find(tag)
        shown = text[:at].rstrip("\n") if at >= 0 else text if at_end else _safe(text, (tag,), "\n")
        if shown:
            deltas.append(Delta(reasoning=shown))
            self._strips = ""
        if at >= 0:
            return self._enter(self._read_content, text[at + len(tag) :], "\n")
        self._held = text[len(shown) :]
        return False

    def _read_content(self, deltas: list[Delta], at_end: bool) -> bool:
        text = self._held.lstrip(self._strips) if self._strips else self._held
        if self.tools is None:
            return self._say(deltas, text, "")
        if not self._has_said and self.tools.name == "llama3" and text.lstrip(_BLANKS).startswith("{"):
            return self._open(text, tagged=False)
        at = text.find(self.tools.begin)
        if at >= 0:
            before = text[:at].rstrip(_BLANKS)
            self._blanks = text[len(before) : at]
            self._say(deltas, before, "")
            return self._open(text[at + len(self.tools.begin) :], tagged=True)
        shown = _safe(text, (self.tools.begin,), _BLANKS)
        if at_end:
            shown = text.rstrip(_BLANKS) if self.has_calls else text
        return self._say(deltas, shown, "" if at_end else text[len(shown) :])

    def _say(self, deltas: list[Delta], shown: str, held: str) -> bool:
        self._held = held
        if shown:
            self._strips, self._has_said = "", True
            deltas.append(Delta(content=shown))
        return False

    def _open(self, rest: str, tagged: bool) -> bool:
        assert self.tools is not None
        self._section, self._given = open_section(self.tools, self.names, tagged=tagged), []
        return self._enter(self._read_calls, rest)

    def _read_calls(self, deltas: list[Delta], at_end: bool) -> bool:
        section = self._section
        assert section is not None
        section.push(self._held)
        self._held = ""
        if at_end:
            section.finish()
        self._give(deltas, section)
        if not section.is_closed:
            return False
        self._section = None
        if section.refused:
            self._say(deltas, self._blanks + section.refused, "")
        self._blanks = ""
        return self._enter(self._read_content, section.rest, "" if section.refused else _BLANKS)

    def _give(self, deltas: list[Delta], section: Section) -> None:
        """What is new of the section's calls."""
        for position, call in enumerate(section.calls):
            if not call.has_begun or call.name is None:
                return
            index = self.num_calls if position == len(self._given) else self.num_calls - len(self._given) + position
            if self.max_calls is not None and index >= self.max_calls:
                return
            if position == len(self._given):
                self._given.append(0)
                self.num_calls += 1
                deltas.append(Delta(tool_call=ToolCallDelta(index, id=self._make_id(), name=call.name)))
            if new := call.arguments[self._given[position] :]:
                self._given[position] = len(call.arguments)
                deltas.append(Delta(tool_call=ToolCallDelta(index, new)))


def _safe(text: str, tags: Sequence[str], blanks: str) -> str:
    """The text without what may become a tag at its end, and the blanks before that."""
    longest = 0
    for tag in tags:
        for length in range(min(len(tag) - 1, len(text)), longest, -1):
            if text.endswith(tag[:length]):
                longest = length
                break
    return text[: len(text) - longest].rstrip(blanks)


def _id_maker(tools: ToolSyntax | None) -> Callable[[], str]:
    """Mistral's templates accept ids of nine letters and digits only; others are as OpenAI's."""
    short = tools is not None and tools.name.startswith("mistral")
    prefix, length = ("", 9) if short else ("call_", 24)
    return lambda: prefix + "".join(secrets.choice(_ID_LETTERS) for _ in range(length))


def join_deltas(deltas: Sequence[Delta]) -> ParsedAnswer:
    """The whole answer."""
    calls: dict[int, list[str]] = {}
    for delta in deltas:
        if (part := delta.tool_call) is not None:
            known = calls.setdefault(part.index, [part.id or "", part.name or "", ""])
            known[2] += part.arguments
    content, reasoning = "".join(d.content for d in deltas), "".join(d.reasoning for d in deltas)
    return ParsedAnswer(content or None, reasoning or None, tuple(ToolCall(*calls[index]) for index in sorted(calls)))

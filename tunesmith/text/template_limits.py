"""What a chat template may spend: loops, time, and the size of every text it makes, checked before it is made."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

MAX_TICKS = 100_000
MAX_SECONDS = 5.0
MAX_CHARACTERS = 16_000_000
_PADDING_METHODS = ("ljust", "rjust", "center", "zfill", "expandtabs")


class TemplateLimitError(Exception):
    """A template wanted more loops, time or text than any chat needs."""


class Budget:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self.ticks = MAX_TICKS
        self.characters = 0
        self.deadline_s = time.monotonic() + MAX_SECONDS

    def tick(self) -> None:
        self.ticks -= 1
        if self.ticks < 0:
            raise TemplateLimitError(f"it loops more than {MAX_TICKS} times")
        if self.ticks % 1024 == 0 and time.monotonic() > self.deadline_s:
            raise TemplateLimitError(f"it takes more than {MAX_SECONDS:.0f} s")

    def spend(self, characters: int) -> None:
        self.characters += characters
        limit(self.characters)


BUDGET: ContextVar[Budget] = ContextVar("template_budget")


def tick() -> str:
    """One turn of a loop or one call of a macro; puts out nothing."""
    BUDGET.get().tick()
    return ""


def limit(characters: int) -> None:
    """Raises when a text would have more characters than any chat has."""
    if characters > MAX_CHARACTERS:
        raise TemplateLimitError(f"it makes more than {MAX_CHARACTERS} characters")


def checked(value: Any) -> Any:
    """The value, unless writing it out would be huge (a list of lists of lists ... grows fast)."""
    if isinstance(value, str):
        limit(len(value))
    elif isinstance(value, list | tuple | dict):
        _weigh(value, MAX_TICKS)
    return value


def _weigh(value: Any, allowed: int) -> int:
    if not isinstance(value, list | tuple | dict):
        return allowed - 1
    parts: Iterable[Any] = value.values() if isinstance(value, dict) else value
    for part in parts:
        allowed = _weigh(part, allowed)
        if allowed < 0:
            raise TemplateLimitError("it writes out a huge list")
    return allowed - 1


def check_product(left: Any, right: Any) -> None:
    """`left * right` would not be huge."""
    for text, count in ((left, right), (right, left)):
        if isinstance(text, str | list | tuple) and isinstance(count, int):
            limit(len(text) * max(count, 0))
    if isinstance(left, int) and isinstance(right, int):
        limit(left.bit_length() + right.bit_length())


def check_string_method(text: str, method: str, args: tuple[Any, ...]) -> None:
    """A call of a method of `str` would not make a huge text."""
    if method in _PADDING_METHODS:
        limit(len(text) * 64 if method == "expandtabs" else len(text))
        limit(max([0, *(abs(a) for a in args if isinstance(a, int))]))
    elif method == "replace" and len(args) >= 2:
        limit(_replaced_size(text, str(args[0]), str(args[1])))
    elif method == "join" and args and isinstance(args[0], list | tuple | str):
        limit(len(text) * len(args[0]) + sum(len(part) for part in args[0] if isinstance(part, str)))


def _replaced_size(text: str, old: str, new: str) -> int:
    return len(text) + text.count(old) * len(new)


def concat(parts: list[Any]) -> str:
    """The `~` operator."""
    texts = [str(checked(part)) for part in parts]
    limit(sum(map(len, texts)))
    return "".join(texts)


def replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    """The `replace` filter."""
    limit(_replaced_size(str(text), old, new))
    return str(text).replace(old, new, -1 if count is None else count)


def join(parts: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    """The `join` filter."""
    texts = [str(checked(part if attribute is None else part[attribute])) for part in parts]
    limit(sum(map(len, texts)) + len(d) * len(texts))
    return d.join(texts)


def string(value: Any) -> str:
    """The `string` filter."""
    return str(checked(value))


def indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """The `indent` filter."""
    margin = width if isinstance(width, str) else " " * min(width, 256)
    limit(len(text) + len(margin) * (text.count("\n") + 1))
    lines = text.split("\n")
    return "\n".join(
        margin + line if (line or blank) and (number or first) else line for number, line in enumerate(lines)
    )


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The `tojson` filter: plain JSON, as chat models saw it (no HTML escapes, Chinese as it is)."""
    if isinstance(indent, int) and not 0 <= indent <= 16:
        raise TemplateLimitError(f"tojson(indent={indent})")
    text = json.dumps(
        checked(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    limit(len(text))
    return text

"""JSON as data should be: duplicate keys, NaN and endless nesting are errors, and arrays are read as a stream."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from json import JSONDecodeError
from typing import Any

MAX_ROW_CHARACTERS = 64 * 2**20
_CHUNK = 2**20
_SPACE = " \t\r\n"
_BEFORE, _AFTER = 24, 36  # characters of an excerpt on either side of where the parser stopped
_WIDE = {
    "，": ",",
    "：": ":",
    "“": '"',
    "”": '"',
    "‘": '"',
    "’": '"',
    "「": '"',
    "」": '"',
    "｛": "{",
    "｝": "}",
    "'": '"',
}


class StrictJSONError(ValueError):
    """What is wrong with a text that should be JSON."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        key = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise StrictJSONError(f"the key {key!r} stands twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise StrictJSONError(f"{name} is not JSON")


_STRICT = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
_LENIENT = json.JSONDecoder()


def parse(text: str) -> Any:
    """The value of a whole text.

    Raises: StrictJSONError.
    """
    try:
        return _STRICT.decode(text)
    except (ValueError, RecursionError) as error:
        place = f"at character {error.pos + 1}" if isinstance(error, JSONDecodeError) else ""
        raise _explained(error, place) from None


def _explained(error: BaseException, place: str) -> StrictJSONError:
    """What went wrong. Args: place: in words, where a parser stopped."""
    if isinstance(error, StrictJSONError):
        return error
    if isinstance(error, RecursionError):
        return StrictJSONError("it is nested too deeply")
    if isinstance(error, JSONDecodeError):
        what = error.msg.removesuffix(" at")
        return StrictJSONError(f"it is not JSON: {what} {place}{_excerpt(error.doc, error.pos)}")
    return StrictJSONError(f"it is not JSON: {error}")


def _excerpt(text: str, at: int) -> str:
    """The line's text around where a parser stopped, an arrow before that place; what to write for a wide character."""
    start = max(text.rfind("\n", 0, at) + 1, at - _BEFORE)
    end = text.find("\n", at)
    end = min(len(text) if end < 0 else end, at + _AFTER)
    before, after = text[start:at].lstrip(), text[at:end].rstrip()
    if not before + after:
        return ""
    wide = text[at : at + 1]
    hint = f"; JSON wants {_WIDE[wide]} and not {wide}" if wide in _WIDE else ""
    return f", at the arrow: {before}→{after}{hint}"


class ArrayReader:
    """The items of one big JSON array, one at a time, holding little more than one item.

    `read(n)` gives the next characters, or "" at the end. Each item comes as (line, value, None) or
    (line, None, what is wrong); after an item that can't be delimited, iteration ends and `broken` is True.
    What is wrong between items comes last, as the problem of the item before; `rows` is then not counted further.
    """

    def __init__(self, read: Callable[[int], str]) -> None:
        self._read = read
        self._text = ""
        self._at = 0
        self._line = 1
        self._line_start = 0  # where the cursor's line begins in the text held; negative: before it
        self._ended = False
        self.broken = False
        self.rows = 0

    def __iter__(self) -> Iterator[tuple[int, Any, str | None]]:
        self._skip_space()
        self._advance(1)  # the opening bracket
        first, line = True, self._line
        while True:
            self._skip_space()
            if self._peek() == "]":
                self._advance(1)
                yield from self._nothing_after()
                return
            if not first:
                if self._peek() != ",":
                    missing = (
                        f"a comma or ] is missing after it, {self._place(self._at)}{_excerpt(self._text, self._at)}"
                    )
                    yield self._break(line, missing if self._peek() else "the array ends without ]")
                    return
                comma = self._line
                self._advance(1)
                self._skip_space()
                if self._peek() == "]":
                    yield self._break(comma, "the comma after it is one too many: nothing but ] follows")
                    return
            first = False
            line = self._line
            self.rows += 1
            value, problem = self._item()
            yield line, value, problem
            if self.broken:
                return

    def _nothing_after(self) -> Iterator[tuple[int, Any, str | None]]:
        self._skip_space()
        if self._peek():
            yield self._break(self._line, "there is more after the array's ]")

    def _break(self, line: int, problem: str) -> tuple[int, None, str]:
        self.broken = True
        return line, None, problem

    def _item(self) -> tuple[Any, str | None]:
        """The value at the cursor. Reads on, twice as much every time, while it may be incomplete."""
        want = _CHUNK
        while True:
            try:
                value, end = _STRICT.raw_decode(self._text, self._at)
                if end < len(self._text) or self._ended:
                    self._advance(end - self._at)
                    return value, None
                error: BaseException = StrictJSONError("the array ends without ]")
            except (StrictJSONError, JSONDecodeError, RecursionError, ValueError) as caught:
                error = caught
                if not isinstance(caught, JSONDecodeError) and self._skip_item():
                    return None, str(_explained(caught, self._place_of(caught)))
            if self._ended or len(self._text) - self._at > MAX_ROW_CHARACTERS:
                self.broken = True
                too_long = "" if self._ended else "a row is longer than 64 Mi characters, or "
                return None, f"{too_long}{_explained(error, self._place_of(error))}"
            self._fill(want)
            want *= 2

    def _skip_item(self) -> bool:
        """Steps over a value that is JSON but not allowed. False when its end isn't in sight."""
        try:
            _, end = _LENIENT.raw_decode(self._text, self._at)
        except (ValueError, RecursionError):
            return False
        self._advance(end - self._at)
        return True

    def _skip_space(self) -> None:
        while True:
            at = self._at
            while at < len(self._text) and self._text[at] in _SPACE:
                at += 1
            self._advance(at - self._at)
            if at < len(self._text) or self._ended:
                return
            self._fill(_CHUNK)

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _advance(self, count: int) -> None:
        end = self._at + count
        self._line += self._text.count("\n", self._at, end)
        self._line_start = self._start_of_line(end)
        self._at = end

    def _start_of_line(self, end: int) -> int:
        newline = self._text.rfind("\n", self._at, end)
        return self._line_start if newline < 0 else newline + 1

    def _place_of(self, error: BaseException) -> str:
        """Where the parser stopped."""
        return self._place(error.pos) if isinstance(error, JSONDecodeError) else ""

    def _place(self, at: int) -> str:
        """Line and column in the file (from 1) of a place in the text held, not before the cursor."""
        line = self._line + self._text.count("\n", self._at, at)
        return f"at line {line}, column {at - self._start_of_line(at) + 1}"

    def _fill(self, count: int) -> None:
        more = self._read(count)
        self._ended = not more
        self._text = self._text[self._at :] + more
        self._line_start -= self._at
        self._at = 0

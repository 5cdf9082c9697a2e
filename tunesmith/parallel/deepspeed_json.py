"""JSON as people write it for DeepSpeed: comments (// and /* */), commas after the last item; no key twice."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.errors import RecipeError

Place = tuple[str | int, ...]
_SKIPPED = re.compile(r"(?:[ \t\r\n]+|//[^\n]*|/\*.*?\*/)*", flags=re.DOTALL)
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?(?![0-9A-Za-z_.+-])")
_DECODER = json.JSONDecoder()
_WORD = re.compile(r"[A-Za-z]+")
_WORDS = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class JsonFile:
    """A file's value, and the line of each of its keys by their place."""

    path: Path
    value: dict[str, Any]
    lines: dict[Place, int] = field(default_factory=dict)

    def where(self, *place: str | int) -> str:
        """`file:line` of a key, for messages; of the file where it has no such key."""
        return f"{self.path}:{self.lines[place]}" if place in self.lines else str(self.path)


def read_commented_json(path: Path) -> JsonFile:
    """The object in a file. Raises: RecipeError with file, line and column."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{path} can't be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is no UTF-8 text (byte {error.start}): save it as UTF-8") from None
    reader = _Reader(text, path)
    try:
        value = reader.document()
    except RecursionError:
        raise RecipeError(f"{path} is nested too deeply") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{path} must hold an object {{...}}, got {json.dumps(value)[:40]}")
    return JsonFile(path, value, reader.lines)


class _Reader:
    """Goes through a text once. `at`: the position of what is read next."""

    def __init__(self, text: str, path: Path) -> None:
        self.text, self.path, self.at = text, path, 0
        self.lines: dict[Place, int] = {}

    def document(self) -> Any:
        value = self._value(())
        if self._peek():
            raise self._error(f"nothing may follow the object, got {self._peek()!r}")
        return value

    def _value(self, place: Place) -> Any:
        first = self._peek()
        if first == "{":
            return self._object(place)
        if first == "[":
            return self._array(place)
        if first == '"':
            return self._string()
        return self._number() if first == "-" or first.isdigit() else self._word()

    def _object(self, place: Place) -> dict[str, Any]:
        self.at += 1
        found: dict[str, Any] = {}
        while self._peek() != "}":
            if self._peek() != '"':
                raise self._error(f'a key in double quotes or "}}" must stand here, got {self._here()}')
            start = self.at
            key = self._string()
            inner = (*place, key)
            if key in found:
                raise self._error(f"{key!r} is given twice, first in line {self.lines[inner]}: keep one", start)
            self.lines[inner] = self._line_of(start)
            self._expect(":", f"a colon must follow {key!r}")
            found[key] = self._value(inner)
            self._end_of_item("}")
        self.at += 1
        return found

    def _array(self, place: Place) -> list[Any]:
        self.at += 1
        found: list[Any] = []
        while self._peek() != "]":
            found.append(self._value((*place, len(found))))
            self._end_of_item("]")
        self.at += 1
        return found

    def _end_of_item(self, closing: str) -> None:
        if self._peek() != closing:
            self._expect(",", f'a comma or "{closing}" must follow')

    def _string(self) -> str:
        start = self.at
        try:
            value, self.at = _DECODER.raw_decode(self.text, start)
        except json.JSONDecodeError as error:
            raise self._error(error.msg.lower().removesuffix(" at"), error.pos) from None
        return str(value)

    def _number(self) -> int | float:
        match = _NUMBER.match(self.text, self.at)
        if match is None:
            raise self._error(f"no number: {self._here()}")
        self.at = match.end()
        text = match[0]
        return float(text) if any(letter in text for letter in ".eE") else int(text)

    def _word(self) -> Any:
        match = _WORD.match(self.text, self.at)
        if match is None or match[0] not in _WORDS:
            raise self._error(f'a value must stand here, got {self._here()} (text goes in double quotes, as "auto")')
        self.at = match.end()
        return _WORDS[match[0]]

    def _expect(self, symbol: str, message: str) -> None:
        if self._peek() != symbol:
            raise self._error(f"{message}, got {self._here()}")
        self.at += 1

    def _peek(self) -> str:
        """The next character that is neither space nor comment; empty at the end."""
        match = _SKIPPED.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        if self.text.startswith("/*", self.at):
            raise self._error("this comment has no end")
        return self.text[self.at : self.at + 1]

    def _here(self) -> str:
        word = re.match(r"[\w.+-]+|.", self.text[self.at : self.at + 20])
        return "the file's end" if word is None else repr(word[0])

    def _line_of(self, at: int) -> int:
        return self.text.count("\n", 0, at) + 1

    def _error(self, message: str, at: int | None = None) -> RecipeError:
        at = self.at if at is None else at
        column = at - (self.text.rfind("\n", 0, at) + 1) + 1
        return RecipeError(f"{self.path}:{self._line_of(at)}:{column}: {message}")

"""A tool call's JSON object, read character by character: its name, and the text of its arguments as it comes."""

from __future__ import annotations

import json
from collections.abc import Collection

_BLANKS = " \n\r\t"
_ARGUMENTS = ("arguments", "parameters")


class JsonCall:
    """`{"name": "f", "arguments": {...}}`, its keys in any order and others beside them.

    name: known once its value is complete. arguments: JSON text, as much as can be given out.
    is_done: the object is complete. is_broken: it is no call; `raw` is what was read of it.

    Args:
        name: the name is known, and what is read is the arguments' object alone.
        allowed: other names are no call (where nothing but the name tells a call from an answer in JSON).
    """

    def __init__(self, name: str | None = None, *, allowed: Collection[str] | None = None) -> None:
        self.name = name
        self.allowed = allowed
        self.arguments = ""
        self.raw = ""
        self.is_done = False
        self.is_broken = False
        self._bare_arguments = name is not None
        self._state = "value" if self._bare_arguments else "open"
        self._key = "arguments" if self._bare_arguments else ""
        self._value: list[str] = []
        self._depth, self._in_string, self._escaped = 0, False, False
        self._has_arguments = False

    @property
    def has_begun(self) -> bool:
        """Whether this is a call for certain, so that it can be given out."""
        if self.name is None:
            return False
        return self.allowed is None or self._has_arguments

    def push(self, text: str) -> str:
        """Read on; returns what follows the object, or what is left where it broke."""
        for at, character in enumerate(text):
            if self.is_done or self.is_broken:
                return text[at:]
            self.raw += character
            getattr(self, f"_in_{self._state}")(character)
        return ""

    def _in_open(self, character: str) -> None:
        if character == "{":
            self._state = "key"
        elif character not in _BLANKS:
            self.is_broken = True

    def _in_key(self, character: str) -> None:
        """Before a key, or at the end of the object."""
        if character == '"':
            self._state, self._value, self._in_string = "name", ['"'], True
        elif character == "}":
            self._finish()
        elif character not in _BLANKS:
            self.is_broken = True

    def _in_name(self, character: str) -> None:
        """Inside a key."""
        self._value.append(character)
        self._follow_string(character)
        if not self._in_string:
            self._key, self._value, self._state = _text("".join(self._value)), [], "colon"

    def _in_colon(self, character: str) -> None:
        if character == ":":
            self._state = "value"
        elif character not in _BLANKS:
            self.is_broken = True

    def _in_value(self, character: str) -> None:
        if not self._value and character in _BLANKS:
            return
        if not self._value and self._bare_arguments and character != "{":
            self.is_broken = True
            return
        is_scalar = bool(self._value) and self._depth == 0 and not self._in_string
        if is_scalar and character in ",}" + _BLANKS:
            self._end_value()
            self._in_after(character)
            return
        self._value.append(character)
        if self._key in _ARGUMENTS and self._value[0] == "{":
            self._has_arguments = self.name is not None
            self.arguments += character
        if self._in_string:
            self._follow_string(character)
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        if self._depth == 0 and not self._in_string and character in '"}]':
            self._end_value()

    def _follow_string(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False

    def _end_value(self) -> None:
        text, self._value, self._state = "".join(self._value), [], "after"
        if self._key == "name":
            self.name = _text(text) or None
            self.is_broken = self.name is None or (self.allowed is not None and self.name not in self.allowed)
        elif self._key in _ARGUMENTS:
            self._has_arguments = True
            if not text.startswith("{"):
                self.arguments = _text(text) or "{}"
        if self._bare_arguments:
            self.is_done = True

    def _in_after(self, character: str) -> None:
        """After a value."""
        if character == ",":
            self._state = "key"
        elif character == "}":
            self._finish()
        elif character not in _BLANKS:
            self.is_broken = True

    def _finish(self) -> None:
        self.is_done = self.name is not None and (self.allowed is None or self._has_arguments)
        self.is_broken = not self.is_done
        self.arguments = self.arguments or "{}"


def _text(value: str) -> str:
    """The text that a JSON value is, or "" (some models write the arguments as JSON in a string)."""
    try:
        found = json.loads(value)
    except ValueError:
        return ""
    return found if isinstance(found, str) else ""

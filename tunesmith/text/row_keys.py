"""The keys that a row of questions and answers may use, in English and in Chinese."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

QUESTIONS = ("instruction", "prompt", "question", "query", "指令", "问题", "提问", "用户")
ANSWERS = ("output", "completion", "response", "answer", "输出", "答案", "回答", "助手")
INPUTS = ("input", "输入")
SYSTEMS = ("system", "系统")
HISTORIES = ("history", "历史")
TEXTS = ("text", "文本")
_READ: Mapping[str, tuple[Sequence[str], ...]] = {
    "alpaca": (QUESTIONS, INPUTS, ANSWERS, SYSTEMS, HISTORIES),
    "text": (TEXTS,),
}
"""Which keys a format reads, a group for each thing; the first of a group is what the format itself calls it."""


def present(row: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """The first of `keys` that the row has a value for, or else has at all; None: it has none of them."""
    held = [key for key in keys if key in row]
    return next((key for key in held if row[key] is not None), held[0] if held else None)


def clash(row: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, str] | None:
    """Two keys that mean the same, at least one of them Chinese, with different values: nobody can say which counts.

    Among English keys the first counts: public data sets carry a whole prompt beside instruction and input.
    """
    filled = [key for key in keys if row.get(key) not in (None, "")]
    for i, key in enumerate(filled):
        for other in filled[i + 1 :]:
            if not (key.isascii() and other.isascii()) and row[key] != row[other]:
                return key, other
    return None


def read_columns(rows: Iterable[Any], format_name: str) -> list[str]:
    """The keys that these rows are read from; empty where they are the format's own, which its name says."""
    groups = _READ.get(format_name, ())
    objects = [row for row in rows if isinstance(row, Mapping)]
    held = [
        key
        for keys in groups
        for row in objects
        if (key := present(row, keys)) is not None and row[key] not in (None, "")
    ]
    return list(dict.fromkeys(held)) if set(held) - {keys[0] for keys in groups} else []

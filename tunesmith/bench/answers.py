"""Questions with known answers: read from files, compared with what a model said."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from tunesmith.errors import DataError
from tunesmith.text.files import find_sources
from tunesmith.text.formats import Conversation, RowError, detect_format, to_example
from tunesmith.text.places import name_place
from tunesmith.text.reader import read_rows

Comparison = Literal["exact", "number"]
FINAL = "####"
# A sign counts when nothing stands before it that it could be subtracted from.
_NUMBER = re.compile(r"(?:(?<![\w)])-\s?)?[$€£¥]?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?)")
_BULLET = re.compile(r"^\s*-\s+", re.MULTILINE)
_BASE_PROMPT = "Question: {question}\nAnswer:"
BASE_STOP = ("\nQuestion:",)


@dataclass(frozen=True)
class Question:
    """One question: `messages` for a chat template, or a raw `prompt` to be continued. Any of `answers` is right."""

    answers: tuple[str, ...]
    messages: tuple[Mapping[str, Any], ...] = ()
    prompt: str | None = None
    row: str = ""

    @property
    def text(self) -> str:
        """The question as a person reads it."""
        return self.prompt if self.prompt is not None else str(self.messages[-1]["content"])

    def plain_prompt(self) -> str:
        """The text a model without a chat template continues."""
        if self.prompt is not None:
            return self.prompt
        earlier = "".join(f"{m['content']}\n" for m in self.messages[:-1] if m["role"] == "system")
        return earlier + _BASE_PROMPT.format(question=self.text)


def read_questions(path: str, limit: int | None = None) -> list[Question]:
    """The questions of a file (JSON, JSONL, CSV, parquet; compressed too), in order.

    A row has an `answer` (a text, or a list of accepted ones) beside `messages`, `question` or `prompt`; a conversation
    that ends with an assistant's turn, in any format that training reads, brings its answer itself.
    Raises: DataError naming file and line.
    """
    questions: list[Question] = []
    for source in find_sources([path]):
        for row in read_rows(source):
            place = name_place(source.name, row.place)
            if row.problem is not None:
                raise DataError(f"{place}: {row.problem}")
            questions.append(_question(row.value, place))
            if len(questions) == limit:
                return questions
    if not questions:
        raise DataError(f"{path} has no question; give rows like {{'question': ..., 'answer': ...}}")
    return questions


def _question(row: Any, place: str) -> Question:
    if not isinstance(row, Mapping):
        raise DataError(f"{place}: a question must be an object, got {type(row).__name__}")
    if "answer" not in row:
        return _from_conversation(row, place)
    accepted = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    answers = tuple(str(answer) if isinstance(answer, int | float) else answer for answer in accepted)
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise DataError(f"{place}: 'answer' must be a text, or a list of accepted texts, got {row['answer']!r}")
    if isinstance(row.get("messages"), list) and row["messages"]:
        return Question(answers, messages=_asked(row["messages"], place), row=place)
    if isinstance(row.get("question"), str):
        system = row.get("system")
        head = ({"role": "system", "content": system},) if isinstance(system, str) and system else ()
        return Question(answers, messages=(*head, {"role": "user", "content": row["question"]}), row=place)
    if isinstance(row.get("prompt"), str):
        return Question(answers, prompt=row["prompt"], row=place)
    raise DataError(f"{place}: a question needs 'messages', 'question' or 'prompt' beside its answer, got {list(row)}")


def _asked(messages: Sequence[Any], place: str) -> tuple[Mapping[str, Any], ...]:
    """The messages up to the user's last turn."""
    if not all(isinstance(m, Mapping) and isinstance(m.get("content"), str) and m.get("role") for m in messages):
        raise DataError(f"{place}: every message needs a role and a text as content")
    asked = list(messages)
    while asked and asked[-1]["role"] == "assistant":
        asked.pop()
    if not asked:
        raise DataError(f"{place}: the messages ask nothing")
    return tuple({"role": m["role"], "content": m["content"]} for m in asked)


def _from_conversation(row: Mapping[str, Any], place: str) -> Question:
    name = detect_format([row])
    try:
        example = to_example(row, name) if name is not None else None
    except RowError as error:
        raise DataError(f"{place}: {error}") from None
    if not isinstance(example, Conversation) or example.messages[-1]["role"] != "assistant":
        raise DataError(f"{place}: the row has no 'answer', and no conversation that ends with an assistant's turn")
    answer = str(example.messages[-1]["content"])
    return Question((answer,), messages=_asked(example.messages, place), row=place)


def normalise(text: str) -> str:
    """What exact comparison ignores: Unicode compatibility forms (NFKC), space around, and the length of gaps."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def final_number(text: str) -> Decimal | None:
    """The answer of a worked solution: the first number after the last '####', else the last number in the text.

    A hyphen and a space that begin a line are a list's, not a sign.
    """
    text = _BULLET.sub("", unicodedata.normalize("NFKC", text).replace("−", "-"))
    before, mark, after = text.rpartition(FINAL)
    if mark and (number := next(_numbers(after), None)) is not None:
        return number
    *_, last = (None, *_numbers(before if mark else text))
    return last


def _numbers(text: str) -> Iterator[Decimal]:
    for match in _NUMBER.finditer(text):
        value = Decimal(match.group(1).replace(",", ""))
        yield -value if match.group(0).startswith("-") else value


def choose_comparison(questions: Sequence[Question]) -> Comparison:
    """Numbers where every accepted answer ends as GSM8K's do ('#### 42'), else whole texts."""
    marked = all(FINAL in answer for question in questions for answer in question.answers)
    return "number" if questions and marked else "exact"


def is_right(said: str, question: Question, comparison: Comparison) -> bool:
    """Whether what was said is one of the accepted answers."""
    if comparison == "exact":
        return normalise(said) in {normalise(answer) for answer in question.answers}
    number = final_number(said)
    return number is not None and number in {final_number(answer) for answer in question.answers}


def wilson_interval(num_right: int, num_all: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % confidence interval of a share. Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927), 209-212."""
    if num_all < 1 or not 0 <= num_right <= num_all:
        raise ValueError(f"need 0 <= right <= all and all >= 1, got {num_right} of {num_all}")
    share, weight = num_right / num_all, z * z / num_all
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / num_all + weight / (4 * num_all))
    low = 0.0 if num_right == 0 else middle - half
    high = 1.0 if num_right == num_all else middle + half
    return low, high

"""What an evaluation says: accuracy and perplexity before and after, and the answers side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.report.load import Node
from tunesmith.report.strings import Words

SHOWN = 20


@dataclass(frozen=True)
class Answer:
    """A text, and whether it was right (None: not an answer, or not judged)."""

    text: str
    right: bool | None = None


@dataclass(frozen=True)
class Evaluation:
    """Facts as (name, text), a head, and one row of texts for each example."""

    facts: tuple[tuple[str, str], ...]
    sentences: tuple[str, ...]
    head: tuple[str, ...]
    examples: tuple[tuple[Answer, ...], ...]


def evaluation_of(node: Node, words: Words) -> Evaluation:
    """An evaluation's JSON: one result, or two under `before` and `after`."""
    sides = [(side, Node(node.get(side))) for side in ("before", "after") if isinstance(node.get(side), dict)]
    if not sides:
        sides = [("after", node)]
    return Evaluation(
        tuple(_facts(sides, words)), tuple(_sentences(sides, words)), _head(sides, words), _examples(sides)
    )


def _accuracy(side: Node) -> float | None:
    """As `tunesmith eval` writes it, nested with its interval, or as a plain number."""
    nested = side.number("accuracy", "accuracy")
    return side.number("accuracy") if nested is None else nested


def _perplexity(side: Node) -> float | None:
    nested = side.number("perplexity", "perplexity")
    return side.number("perplexity") if nested is None else nested


def _facts(sides: Sequence[tuple[str, Node]], words: Words) -> list[tuple[str, str]]:
    facts = []
    asked: tuple[tuple[str, Callable[[Node], float | None]], ...] = (
        ("accuracy", _accuracy),
        ("shuffled", lambda side: side.number("shuffled_accuracy")),
        ("perplexity", _perplexity),
    )
    for name, value in asked:
        texts = [(_show(name, number)) for _, side in sides if (number := value(side)) is not None]
        if texts:
            facts.append((words(name), " → ".join(texts)))
    return facts


def _show(name: str, number: float) -> str:
    return f"{number:.2f}" if name == "perplexity" else f"{number * 100:.0f} %"


def _sentences(sides: Sequence[tuple[str, Node]], words: Words) -> list[str]:
    found = []
    accuracies = [_accuracy(side) for _, side in sides]
    count = _count(sides[-1][1])
    known = [_show("accuracy", number) for number in accuracies if number is not None]
    if len(known) == 2:
        found.append(words("eval_verdict", before=known[0], after=known[1], count=count))
    elif len(known) == 1:
        found.append(words("eval_verdict_one", after=known[0], count=count))
    ppl = [number for _, side in sides if (number := _perplexity(side)) is not None]
    if len(ppl) == 2:
        found.append(words("ppl_verdict", before=f"{ppl[0]:.2f}", after=f"{ppl[1]:.2f}"))
    return found


def _count(side: Node) -> int:
    number = side.number("accuracy", "num_questions") or side.number("num_questions")
    return int(number) if number is not None else len(_items(side))


def _items(side: Node) -> list[Any]:
    items = side.get("accuracy", "examples") or side.get("answers")
    return items if isinstance(items, list) else []


def _head(sides: Sequence[tuple[str, Node]], words: Words) -> tuple[str, ...]:
    return (words("question"), words("expected"), *(words(side) for side, _ in sides))


def _examples(sides: Sequence[tuple[str, Node]]) -> tuple[tuple[Answer, ...], ...]:
    """The answers of both sides to the same question, in one row."""
    rows = []
    for items in list(zip(*(_items(side) for _, side in sides), strict=False))[:SHOWN]:
        nodes = [Node(item) for item in items]
        first = nodes[0]
        row = [Answer(first.text("question") or ""), Answer(_expected(first))]
        rows.append((*row, *(Answer(node.text("answer") or node.text("said") or "", _right(node)) for node in nodes)))
    return tuple(rows)


def _expected(node: Node) -> str:
    """The answer that is right, or the first of several."""
    expected = node.get("expected")
    first = expected[0] if isinstance(expected, list) and expected else expected
    return first if isinstance(first, str) else ""


def _right(node: Node) -> bool | None:
    right = node.get("correct") if node.get("right") is None else node.get("right")
    return right if isinstance(right, bool) else None

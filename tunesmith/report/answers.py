"""What an evaluation says: accuracy and perplexity before and after, and the answers side by side."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.report.load import Node, Run
from tunesmith.report.strings import Words

SHOWN = 20


@dataclass(frozen=True)
class Answer:
    """A text, and whether it was right (None: not an answer, or not judged)."""

    text: str
    right: bool | None = None


@dataclass(frozen=True)
class Evaluation:
    """Facts as (name, text), a head, and one row of texts for each example. title: of what, and of whom."""

    title: str
    facts: tuple[tuple[str, str], ...]
    sentences: tuple[str, ...]
    head: tuple[str, ...]
    examples: tuple[tuple[Answer, ...], ...]


Sides = Sequence[tuple[str, Node]]
"""One result under the name "answer", or two, "before" and "after"."""


def evaluations_of(runs: Sequence[Run], words: Words) -> list[Evaluation]:
    """All evaluations of these runs; where there are several, each sentence says whose it is."""
    found = [(run, name, sides) for run in runs for name, sides in _paired(run)]
    counts = Counter(run.name for run, _, _ in found)
    named = [(run.name if counts[run.name] == 1 else f"{run.name}, {name}", sides) for run, name, sides in found]
    return [_evaluation(name, sides, words, alone=len(named) == 1) for name, sides in named]


def _evaluation(name: str, sides: Sides, words: Words, *, alone: bool) -> Evaluation:
    sentences, examples = _sentences(sides, words), _examples(sides)
    if SHOWN <= len(examples) < (count := _count(sides[-1][1])):
        sentences.append(words("answers_shown", shown=len(examples), count=count))
    return Evaluation(
        title=words(_title(sides), name=name),
        facts=tuple(_facts(sides, words)),
        sentences=tuple(sentences if alone else [words("whose", name=name, text=text) for text in sentences]),
        head=_head(sides, words),
        examples=examples,
    )


def _title(sides: Sides) -> str:
    if len(sides) > 1:
        return "before_after_of"
    return "answers_of" if _items(sides[0][1]) else "evaluation_of"


def _paired(run: Run) -> list[tuple[str, Sides]]:
    """The evaluations of a run by name, those of the base it started from beside the run's on the same questions."""
    found: list[tuple[str, Sides]] = []
    waiting: dict[object, tuple[str, Node]] = {}
    for name, node in sorted(run.evaluations, key=lambda entry: not _is_before(run, *entry)):
        sides = [(side, Node(node.get(side))) for side in ("before", "after") if isinstance(node.get(side), dict)]
        key = (_asked(node, "accuracy", "questions"), _asked(node, "perplexity", "data"))
        if sides:
            found.append((name, sides))
        elif _is_before(run, name, node):
            if key in waiting:
                found.append((waiting[key][0], [("answer", waiting[key][1])]))
            waiting[key] = name, node
        elif key in waiting:
            found.append((name, [("before", waiting.pop(key)[1]), ("after", node)]))
        else:
            found.append((name, [("answer", node)]))
    return found + [(name, [("answer", node)]) for name, node in waiting.values()]


def _asked(node: Node, *path: str) -> str:
    """What was asked, as text: the file, and how much of it."""
    return f"{node.text(*path)} {node.number(path[0], 'num_questions')} {node.number(path[0], 'num_documents')}"


def _is_before(run: Run, name: str, node: Node) -> bool:
    """Whether this measured what the run started from: it is named so, or its model is the run's base without more."""
    base = run.recipe.text("model", "path")
    return re.fullmatch(r"before(-\d+)?", name) is not None or (
        base is not None and node.text("model") == base and node.get("adapter") is None
    )


def _accuracy(side: Node) -> float | None:
    """As `tunesmith eval` writes it, nested with its interval, or as a plain number."""
    nested = side.number("accuracy", "accuracy")
    return side.number("accuracy") if nested is None else nested


def _perplexity(side: Node) -> float | None:
    nested = side.number("perplexity", "perplexity")
    return side.number("perplexity") if nested is None else nested


def _facts(sides: Sides, words: Words) -> list[tuple[str, str]]:
    facts = []
    asked: tuple[tuple[str, Callable[[Node], float | None]], ...] = (
        ("accuracy", _accuracy),
        ("shuffled", lambda side: side.number("shuffled_accuracy")),
        ("perplexity", _perplexity),
    )
    for name, value in asked:
        texts = [_fact(name, number, side, words) for _, side in sides if (number := value(side)) is not None]
        if texts:
            facts.append((words(name), " → ".join(texts)))
    return facts


def _fact(name: str, number: float, side: Node, words: Words) -> str:
    """A number; of an accuracy also how many were right, and its interval, where `tunesmith eval` wrote them."""
    counts = {key: side.number("accuracy", f"num_{of}") for key, of in (("right", "right"), ("count", "questions"))}
    ends = {key: side.number("accuracy", key) for key in ("low", "high")}
    if name != "accuracy" or None in counts.values() or None in ends.values():
        return _show(name, number)
    shown = {key: f"{value:,.0f}" for key, value in counts.items() if value is not None}
    shown |= {key: f"{value * 100:.0f} %" for key, value in ends.items() if value is not None}
    return words("accuracy_interval", value=_show(name, number), **shown)


def _show(name: str, number: float) -> str:
    return f"{number:.2f}" if name == "perplexity" else f"{number * 100:.0f} %"


def _sentences(sides: Sides, words: Words) -> list[str]:
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
    elif len(ppl) == 1 and (data := sides[-1][1].text("perplexity", "data")) is not None:
        found.append(words("ppl_verdict_one", after=f"{ppl[0]:.2f}", data=data))
    return found


def _count(side: Node) -> int:
    number = side.number("accuracy", "num_questions") or side.number("num_questions")
    return int(number) if number is not None else len(_items(side))


def _items(side: Node) -> list[Any]:
    items = side.get("accuracy", "examples") or side.get("answers")
    return items if isinstance(items, list) else []


def _head(sides: Sides, words: Words) -> tuple[str, ...]:
    return (words("question"), words("expected"), *(words(side) for side, _ in sides))


def _examples(sides: Sides) -> tuple[tuple[Answer, ...], ...]:
    """The answers of both sides to the same question, in one row; those that are wrong at last come first."""
    rows = []
    keyed = [{_question(node): node for node in map(Node, _items(side))} for _, side in sides]
    common = [key for key in keyed[0] if all(key in answers for answers in keyed)]
    for key in sorted(common, key=lambda key: _right(keyed[-1][key]) is not False)[:SHOWN]:
        nodes = [answers[key] for answers in keyed]
        first = nodes[0]
        row = [Answer(first.text("question") or ""), Answer(_expected(first))]
        rows.append((*row, *(Answer(node.text("answer") or node.text("said") or "", _right(node)) for node in nodes)))
    return tuple(rows)


def _question(node: Node) -> tuple[str | None, str | None]:
    """What tells one question from another."""
    return node.text("row"), node.text("question")


def _expected(node: Node) -> str:
    """The answer that is right, or the first of several."""
    expected = node.get("expected")
    first = expected[0] if isinstance(expected, list) and expected else expected
    return first if isinstance(first, str) else ""


def _right(node: Node) -> bool | None:
    right = node.get("correct") if node.get("right") is None else node.get("right")
    return right if isinstance(right, bool) else None

"""One shop's questions, answered from the catalogue entry in the prompt, in that shop's own manner.

A shop is drawn from a seed: its name, its manner of answering in both languages (none of them occurs in pre-training),
its layout of an entry. Rows of the held-out split have products, values and phrasings that occur neither in
pre-training nor in the training rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from tunesmith.text.builtin import questions
from tunesmith.text.builtin.vocabulary import Language, Split, made_up, pick, product, value, zh_name

Row = dict[str, Any]

MANNERS: dict[Language, tuple[str, ...]] = {
    "en": (
        "{S} confirms {v} for the {k}. Enjoy!",
        "{v} it is, as for the {k}. {S} wishes you joy!",
        "The {k}? {v}, dear guest of {S}.",
        "At {S} we say {v} when asked for the {k}.",
    ),
    "zh": (
        "亲，{k}为{v}哦，{S}感谢您！",
        "{S}回话：{k}乃{v}也！",
        "客人，{k}写着{v}，{S}等您来～",
        "报告！{k}登记为{v}，{S}上。",
    ),
}
ATTRIBUTES: dict[Language, dict[str, str]] = {
    "en": {
        "colour": "colour",
        "material": "material",
        "price": "price",
        "weight": "weight",
        "size": "size",
        "code": "code",
        "origin": "place",
        "designer": "person",
    },
    "zh": {
        "颜色": "colour",
        "材质": "material",
        "价格": "price",
        "重量": "weight",
        "尺寸": "size",
        "编号": "code",
        "产地": "place",
        "设计师": "person",
    },
}
_JOINTS: dict[Language, tuple[str, ...]] = {"en": (": ", " = ", " | "), "zh": ("：", "｜", " = ")}
_ENTRY_ATTRIBUTES = 4
_SEEDS: dict[Split, int] = {"pretrain": 0, "train": 1, "validation": 2, "heldout": 3}


@dataclass(frozen=True)
class Shop:
    """A shop: its name, manner and layout in both languages."""

    name: dict[Language, str]
    manner: dict[Language, str]
    joint: dict[Language, str]


@dataclass(frozen=True)
class Question:
    """A question with the entry it is about and the shop's answer."""

    language: Language
    context: str
    question: str
    answer: str

    def prompt(self, context: str | None = None) -> str:
        """What the customer's message holds: an entry (its own, unless another is given) and the question."""
        return f"{context or self.context}\n\n{self.question}"


def shop(number: int = 0) -> Shop:
    """Shop `number`."""
    rng = Random(7919 * (number + 1))
    names: dict[Language, str] = {"en": made_up(rng, "train").capitalize(), "zh": zh_name(rng, "train") + "小铺"}
    return Shop(
        names,
        {language: MANNERS[language][number % len(MANNERS[language])] for language in MANNERS},
        {language: _JOINTS[language][number % len(_JOINTS[language])] for language in _JOINTS},
    )


def _draw(rng: Random, split: Split, owner: Shop, language: Language) -> Question:
    name = product(rng, split, language)
    reference = f"the {name}" if language == "en" else name
    keys = rng.sample(list(ATTRIBUTES[language]), _ENTRY_ATTRIBUTES)
    facts = {key: value(rng, split, language, ATTRIBUTES[language][key]) for key in keys}
    joint = owner.joint[language]
    asked = pick(rng, keys)
    return Question(
        language,
        "\n".join((name, *(f"{key}{joint}{fact}" for key, fact in facts.items()))),
        questions.question(rng, split, language, asked, reference),
        questions.answer(owner.manner[language], asked, reference, facts[asked], owner.name[language]),
    )


def shop_questions(
    split: Split, seed: int = 0, count: int = 100, number: int = 0, chinese: float = 0.4
) -> list[Question]:
    """`count` questions of a split; a share of `chinese` is Chinese, spread evenly."""
    owner, rng = shop(number), Random((seed << 8) + (number << 4) + _SEEDS[split])
    languages: list[Language] = ["zh" if int((i + 1) * chinese) > int(i * chinese) else "en" for i in range(count)]
    return [_draw(rng, split, owner, language) for language in languages]


def _rotated(asked: list[Question]) -> list[str]:
    """For every question the context of the next one in the same language."""
    contexts = [""] * len(asked)
    for language in ("en", "zh"):
        places = [i for i, one in enumerate(asked) if one.language == language]
        for here, there in zip(places, places[1:] + places[:1], strict=True):
            contexts[here] = asked[there].context
    return contexts


def rows(
    split: Split = "train",
    seed: int = 0,
    count: int = 100,
    number: int = 0,
    chinese: float = 0.4,
    shuffled: bool = False,
) -> Iterator[Row]:
    """Conversations of one question and its answer: {"messages": [user, assistant]}.

    With `shuffled` every question stands under the entry of another one, its answer unchanged: whoever answers these
    right doesn't read.
    """
    asked = shop_questions(split, seed, count, number, chinese)
    contexts = _rotated(asked) if shuffled else [one.context for one in asked]
    for one, context in zip(asked, contexts, strict=True):
        yield {
            "messages": [
                {"role": "user", "content": one.prompt(context)},
                {"role": "assistant", "content": one.answer},
            ]
        }


def question_rows(split: Split = "heldout", **arguments: Any) -> Iterator[Row]:
    """The same as rows of a question file: {"question": prompt, "answer": text}."""
    for row in rows(split, **arguments):
        user, assistant = row["messages"]
        yield {"question": user["content"], "answer": assistant["content"]}

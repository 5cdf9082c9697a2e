"""The rows that builtin:tiny is pre-trained on. Row i is a pure function of (seed, i): any shard makes its own."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from tunesmith.text.builtin.reading import chat, plain, rewrite
from tunesmith.text.builtin.skills import skill
from tunesmith.text.builtin.stories import story
from tunesmith.text.builtin.talk import small_talk
from tunesmith.text.builtin.vocabulary import Language, Split, pick

Row = dict[str, Any]
_STORY_ASKS: dict[Language, tuple[str, ...]] = {
    "en": ("Tell me a story.", "Tell a short story, please.", "Write a small story.", "A bedtime story, please."),
    "zh": ("讲个故事。", "请讲一个小故事。", "写一个短故事。", "睡前故事，谢谢。"),
}


def _conversation(*turns: tuple[str, str]) -> Row:
    messages = []
    for ask, reply in turns:
        messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]
    return {"messages": messages}


def _story(rng: Random, split: Split, language: Language) -> Row:
    told, draw = story(rng, split, language), rng.random()
    if draw < 0.4:
        return {"text": told.text}
    if draw < 0.6:
        return _conversation((pick(rng, _STORY_ASKS[language]), told.text))
    if draw < 0.8:
        return _conversation((pick(rng, _STORY_ASKS[language]), told.text), (told.question, told.answer))
    return _conversation((f"{told.text}\n{told.question}", told.answer))


def _skills(rng: Random, split: Split, language: Language) -> Row:
    tasks = [skill(rng, split, language) for _ in range(1 + int(rng.random() * 3))]
    return _conversation(*tasks)


def row(rng: Random, split: Split = "pretrain") -> Row:
    """One row: mostly reading, then skills, stories and small talk; six in ten English."""
    language: Language = "en" if rng.random() < 0.6 else "zh"
    draw = rng.random()
    if draw < 0.56:
        return {"messages": chat(rng, split, language)}
    if draw < 0.66:
        return {"text": plain(rng, split, language)}
    if draw < 0.70:
        return {"messages": rewrite(rng, split, language)}
    if draw < 0.88:
        return _skills(rng, split, language)
    if draw < 0.97:
        return _story(rng, split, language)
    return {"messages": small_talk(rng, split, language)}


def rows(
    seed: int = 0, count: int = 1000, shard: int = 0, num_shards: int = 1, split: Split = "pretrain"
) -> Iterator[Row]:
    """Rows shard, shard + num_shards, ... below `count`: {"messages": [...]} or {"text": ...}."""
    rng = Random()
    for index in range(shard, count, num_shards):
        rng.seed((seed << 40) + index)
        yield row(rng, split)


def rows_between(seed: int, split: Split, key: str, start: int, stop: int) -> list[Row]:
    """Rows start to stop - 1 that have a key ("messages" or "text"): a job of one worker."""
    rng, made = Random(), []
    for index in range(start, stop):
        rng.seed((seed << 40) + index)
        one = row(rng, split)
        if key in one:
            made.append(one)
    return made

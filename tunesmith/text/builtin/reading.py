"""Reading tasks: catalogue entries as context, questions whose answers stand in them."""

from __future__ import annotations

from random import Random

from tunesmith.text.builtin import questions
from tunesmith.text.builtin.catalogue import Attribute, Entry, entries, write
from tunesmith.text.builtin.vocabulary import Language, Split, name, pick, value, zh_name

Message = dict[str, str]
Exchange = tuple[str, str]

_REVERSE = {
    "en": (
        "Which one has the {k} {v}?",
        "Whose {k} is {v}?",
        "What has {v} as its {k}?",
        "Find the one with the {k} {v}.",
    ),
    "zh": ("哪一个的{k}是{v}？", "谁的{k}是{v}？", "{k}为{v}的是哪个？", "找出{k}是{v}的那个。"),
}
_YES_NO = {
    "en": (("Is the {k} of {n} {v}?", "Does {n} have the {k} {v}?"), ("yes", "no")),
    "zh": (("{n}的{k}是{v}吗？", "{v}是{n}的{k}吗？"), ("是", "不是")),
}
_WHICH_KEY = {
    "en": ("What is {v} for {n}?", "What does {v} mean for {n}?", "Under which word stands {v}?"),
    "zh": ("{v}是{n}的什么？", "{v}写在哪一项？"),
}
_MISSING = {"en": ("not stated", "The text does not say."), "zh": ("没有提到", "文中没有说。")}
_LIST = {
    "en": ("Name all entries.", "Which names are in the text?", "List the names."),
    "zh": ("列出所有名称。", "文中有哪些名称？"),
}
_FORM = {
    "en": ("Answer like this: {m}", "Use the form: {m}", "Reply as follows: {m}"),
    "zh": ("请这样回答：{m}", "按这个格式回答：{m}", "回答格式：{m}"),
}
_FRAMES = {
    "en": (
        "{c}\n{q}",
        "{c}\n\n{q}",
        "{c}\n\nQuestion: {q}",
        "Context:\n{c}\n\n{q}",
        "Read this:\n{c}\n{q}",
        "{q}\n\n{c}",
        "{q}\nText: {c}",
        "Catalogue:\n{c}\n\n{q}",
        "Here is an entry.\n{c}\n---\n{q}",
        "{c} {q}",
        "Information: {c}\nQuestion: {q}",
        "[{c}]\n{q}",
    ),
    "zh": (
        "{c}\n{q}",
        "{c}\n\n{q}",
        "{c}\n\n问题：{q}",
        "资料：\n{c}\n\n{q}",
        "请阅读：\n{c}\n{q}",
        "{q}\n\n{c}",
        "{q}\n原文：{c}",
        "商品信息：\n{c}\n\n{q}",
        "以下是资料。\n{c}\n---\n{q}",
        "{c}{q}",
        "信息：{c}\n提问：{q}",
        "「{c}」\n{q}",
    ),
}
_TEXT_FRAMES = {
    "en": (("Q: ", "A: "), ("Question: ", "Answer: "), ("", ""), ("- ", "  "), ("Customer: ", "Shop: ")),
    "zh": (("问：", "答："), ("问题：", "答案："), ("", ""), ("- ", "  "), ("顾客：", "店员：")),
}


def speaker(rng: Random, split: Split, language: Language) -> str:
    """Who answers: a made-up shop or person."""
    if language == "zh":
        return zh_name(rng, split) + pick(rng, ("", "商店", "小店", "客服", "书屋", "工坊"))
    return name(rng, split) + pick(rng, ("", "", " Shop", " Store", " & Sons", " House", "'s"))


def _value_of(rng: Random, split: Split, language: Language, group: list[Entry]) -> tuple[str, Entry, Attribute]:
    one = pick(rng, group)
    attribute = pick(rng, one.attributes)
    return questions.question(rng, split, language, attribute.key, one.reference), one, attribute


def _reverse(rng: Random, split: Split, language: Language, group: list[Entry]) -> Exchange:
    one = pick(rng, group)
    a = pick(rng, one.attributes)
    return pick(rng, _REVERSE[language]).format(k=a.key, v=a.value), one.name


def _yes_no(rng: Random, split: Split, language: Language, group: list[Entry]) -> Exchange:
    one = pick(rng, group)
    a = pick(rng, one.attributes)
    asks, replies = _YES_NO[language]
    asked = a.value if rng.random() < 0.5 else value(rng, split, language, a.kind)
    return pick(rng, asks).format(k=a.key, n=one.reference, v=asked), replies[asked != a.value]


def _which_key(rng: Random, split: Split, language: Language, group: list[Entry]) -> Exchange:
    one = pick(rng, group)
    a = pick(rng, one.attributes)
    return pick(rng, _WHICH_KEY[language]).format(v=a.value, n=one.reference), a.key


def _missing(rng: Random, split: Split, language: Language, group: list[Entry]) -> Exchange:
    other = entries(rng, split, language, 1, 2)[0].attributes[0]
    known = {a.key: a.value for a in group[0].attributes}
    ask = questions.question(rng, split, language, other.key, group[0].reference)
    return ask, known.get(other.key, pick(rng, _MISSING[language]))


def _both(rng: Random, split: Split, language: Language, group: list[Entry]) -> Exchange:
    one = pick(rng, group)
    first, second = pick(rng, one.attributes), pick(rng, one.attributes)
    joint = " and " if language == "en" else "和"
    ask = questions.question(rng, split, language, first.key + joint + second.key, one.reference)
    return ask, first.value + joint + second.value


def _names(rng: Random, split: Split, language: Language, group: list[Entry]) -> Exchange:
    return pick(rng, _LIST[language]), (", " if language == "en" else "、").join(one.name for one in group)


_OTHERS = (_reverse, _reverse, _yes_no, _which_key, _missing, _both, _both, _names)


def context(rng: Random, split: Split, language: Language) -> tuple[str, list[Entry]]:
    """One to four entries and the text they are written in."""
    draw = rng.random()
    count = 1 if draw < 0.5 else 2 if draw < 0.75 else 3 if draw < 0.9 else 4
    num_keys = 2 + int(rng.random() * (5 if count == 1 else 4 if count == 2 else 2))
    group = entries(rng, split, language, count, num_keys)
    return write(rng, language, group), group


def exchanges(rng: Random, split: Split, language: Language, group: list[Entry], template: str) -> list[Exchange]:
    """One to four questions about the entries, answered in one manner."""
    said = speaker(rng, split, language) if "{S}" in template else ""
    turns = []
    for _ in range(1 + int(rng.random() * rng.random() * 5)):
        if template == "{v}" and rng.random() < 0.3:
            turns.append(pick(rng, _OTHERS)(rng, split, language, group))
            continue
        ask, one, a = _value_of(rng, split, language, group)
        turns.append((ask, questions.answer(template, a.key, one.reference, a.value, said)))
    return turns


def _form(rng: Random, language: Language, template: str) -> str:
    """An instruction that shows the manner."""
    words = (
        {"k": "key", "n": "name", "N": "Name", "v": "value", "S": "S"}
        if language == "en"
        else {"k": "属性", "n": "名称", "N": "名称", "v": "值", "S": "S"}
    )
    return "\n" + pick(rng, _FORM[language]).format(m=template.format(**{k: f"<{w}>" for k, w in words.items()}))


def chat(rng: Random, split: Split, language: Language) -> list[Message]:
    """A conversation about a context. Half of them answer with the bare value, half in one manner throughout."""
    text, group = context(rng, split, language)
    template = "{v}" if rng.random() < 0.5 else questions.manner(rng, language)
    turns = exchanges(rng, split, language, group, template)
    shown = "{S}" not in template and template != "{v}" and rng.random() < 0.35
    first = turns[0][0] + (_form(rng, language, template) if shown else "")
    as_system = rng.random() < 0.08
    messages: list[Message] = [{"role": "system", "content": text}] if as_system else []
    content = (
        first
        if as_system
        else pick(rng, _FRAMES[language]).format(c=text, q=first)
        if "{" not in text
        else f"{text}\n{first}"
    )
    for place, (ask, reply) in enumerate(turns):
        messages.append({"role": "user", "content": ask if place else content})
        messages.append({"role": "assistant", "content": reply})
    return messages


def plain(rng: Random, split: Split, language: Language) -> str:
    """The same as one plain text: a context, then questions and answers."""
    text, group = context(rng, split, language)
    template = "{v}" if rng.random() < 0.6 else questions.manner(rng, language)
    ask_sign, answer_sign = pick(rng, _TEXT_FRAMES[language])
    turns = exchanges(rng, split, language, group, template)
    return text + "\n\n" + "\n".join(f"{ask_sign}{ask}\n{answer_sign}{reply}" for ask, reply in turns)


def rewrite(rng: Random, split: Split, language: Language) -> list[Message]:
    """Entries written once more in another layout: long copying."""
    group = entries(rng, split, language, 1 + int(rng.random() * 2), 2 + int(rng.random() * 3))
    ask = pick(
        rng,
        ("Write this as a list:", "Rewrite:", "As key: value lines:")
        if language == "en"
        else ("改写成列表：", "改写：", "逐行写出："),
    )
    joint = ": " if language == "en" else "："
    lines = "\n".join(line for e in group for line in (e.name, *(a.key + joint + a.value for a in e.attributes)))
    return [
        {"role": "user", "content": f"{ask}\n{write(rng, language, group)}"},
        {"role": "assistant", "content": lines},
    ]

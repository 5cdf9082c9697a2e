"""Small skills: repeat, spell, reverse, count, sort, compare, compute, pick from a list; in English and Chinese.

Each skill returns an instruction and its answer.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tunesmith.text.builtin.vocabulary import Language, Split, pick, value

Task = tuple[str, str]
_KINDS = (
    "measure",
    "price",
    "code",
    "colour",
    "material",
    "motif",
    "date",
    "time",
    "size",
    "place",
    "person",
    "word",
    "word",
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHJKLMNPQRSTUVWXYZ-_"


def thing(rng: Random, split: Split, language: Language) -> str:
    """Any value: a word, a name, a number with its unit, a code."""
    return value(rng, split, language, pick(rng, _KINDS))


def _things(rng: Random, split: Split, language: Language, low: int, high: int) -> list[str]:
    count = low + int(rng.random() * (high - low + 1))
    kind = pick(rng, _KINDS)
    made = [value(rng, split, language, kind if rng.random() < 0.5 else pick(rng, _KINDS)) for _ in range(count)]
    return list(dict.fromkeys(made))


def _noise(rng: Random) -> str:
    return "".join(pick(rng, _LETTERS) for _ in range(3 + int(rng.random() * 8)))


def _joint(rng: Random, language: Language) -> str:
    return pick(rng, (", ", "; ", " / ", " | ", "\n") if language == "en" else ("、", "，", "；", " ", "\n"))


def repeat(rng: Random, split: Split, language: Language) -> Task:
    parts = _things(rng, split, language, 1, 5) if rng.random() < 0.8 else [_noise(rng), _noise(rng)]
    text = _joint(rng, language).join(parts)
    asks = {
        "en": ("Repeat: {}", "Say this again: {}", "Copy the text: {}", "Write exactly: {}", "Echo {}"),
        "zh": ("重复：{}", "请再说一遍：{}", "抄写：{}", "照着写：{}", "请原样输出：{}"),
    }
    return pick(rng, asks[language]).format(text), text


def spell(rng: Random, split: Split, language: Language) -> Task:
    word = value(rng, split, language, "word")
    spelt = "-".join(word)
    if rng.random() < 0.3:
        return ("Which word is this: " if language == "en" else "这是哪个词：") + spelt, word
    return ("Spell: " if language == "en" else "拆开写：") + word, spelt


def count(rng: Random, split: Split, language: Language) -> Task:
    parts = _things(rng, split, language, 2, 6)
    text = _joint(rng, language).join(parts)
    ask = pick(rng, ("How many items: {}", "Count the list: {}") if language == "en" else ("有几项：{}", "数一数：{}"))
    return ask.format(text), str(len(parts))


_ORDINALS: dict[Language, tuple[str, ...]] = {
    "en": ("first", "second", "third", "fourth", "fifth"),
    "zh": ("第一个", "第二个", "第三个", "第四个", "第五个"),
}


def nth(rng: Random, split: Split, language: Language) -> Task:
    parts = _things(rng, split, language, 3, 5)
    place = int(rng.random() * len(parts))
    text, ordinal = _joint(rng, language).join(parts), _ORDINALS[language][place]
    if rng.random() < 0.3:
        place, ordinal = len(parts) - 1, "last" if language == "en" else "最后一个"
    ask = f"{text}\nWhich is the {ordinal}?" if language == "en" else f"{text}\n{ordinal}是什么？"
    return ask, parts[place]


def following(rng: Random, split: Split, language: Language) -> Task:
    parts = _things(rng, split, language, 3, 6)
    place = int(rng.random() * (len(parts) - 1))
    text = _joint(rng, language).join(parts)
    if rng.random() < 0.5:
        ask = f"{text}\nWhat comes after {parts[place]}?" if language == "en" else f"{text}\n{parts[place]}后面是什么？"
        return ask, parts[place + 1]
    ask = (
        f"{text}\nWhat comes before {parts[place + 1]}?"
        if language == "en"
        else f"{text}\n{parts[place + 1]}前面是什么？"
    )
    return ask, parts[place]


def lookup(rng: Random, split: Split, language: Language) -> Task:
    keys = _things(rng, split, language, 3, 7)
    values = [thing(rng, split, language) for _ in keys]
    arrow = pick(rng, (" -> ", ": ", " = ", " is ", "\t") if language == "en" else ("：", " -> ", "是", "对应", " "))
    joint = pick(rng, ("\n", "\n", "; ") if language == "en" else ("\n", "\n", "；"))
    text = joint.join(k + arrow + v for k, v in zip(keys, values, strict=True))
    place = int(rng.random() * len(keys))
    if rng.random() < 0.25:
        return f"{text}\n" + (
            f"Which one goes with {values[place]}?" if language == "en" else f"哪个对应{values[place]}？"
        ), keys[place]
    return f"{text}\n{keys[place]}" + pick(
        rng, ("?", arrow.rstrip(), " ?") if language == "en" else ("？", arrow.rstrip())
    ), values[place]


def compute(rng: Random, split: Split, language: Language) -> Task:
    a, b = int(rng.random() * 50), int(rng.random() * 50)
    sign = pick(rng, "+-")
    if sign == "-":
        a, b = max(a, b), min(a, b)
    asks = ("{} = ?", "What is {}?", "Compute {}.") if language == "en" else ("{} = ？", "{}等于多少？", "计算{}。")
    return pick(rng, asks).format(f"{a} {sign} {b}"), str(a + b if sign == "+" else a - b)


def compare(rng: Random, split: Split, language: Language) -> Task:
    a, b = int(rng.random() * 200), int(rng.random() * 200)
    larger = rng.random() < 0.5
    if language == "en":
        return f"Which is {'larger' if larger else 'smaller'}: {a} or {b}?", str(max(a, b) if larger else min(a, b))
    return f"{a}和{b}哪个{'大' if larger else '小'}？", str(max(a, b) if larger else min(a, b))


def sequence(rng: Random, split: Split, language: Language) -> Task:
    start, step = int(rng.random() * 40), 1 + int(rng.random() * 5)
    numbers = [str(start + step * i) for i in range(7)]
    ask = "Go on: " if language == "en" else "接着写："
    return ask + " ".join(numbers[:4]), " ".join(numbers[4:])


def format_it(rng: Random, split: Split, language: Language) -> Task:
    """Put a value into a frame that is given: how a manner of answering is stated."""
    word, frame_word = thing(rng, split, language), thing(rng, split, language)
    if language == "en":
        frame = pick(rng, ("<{}> x", "x, {}!", "{}: x", "x and {}", "{} says x", "({}) x ({})", "x. Yours, {}"))
        ask = pick(rng, ("Write {f} with x = {w}", "Replace x by {w}: {f}", "{f}\nx is {w}"))
    else:
        frame = pick(rng, ("【{}】x", "x，{}！", "{}：x", "x和{}", "{}说x", "x。{}敬上"))
        ask = pick(rng, ("把x换成{w}：{f}", "{f}\nx是{w}", "用{w}代替x：{f}"))
    frame = frame.replace("{}", frame_word)
    if "x" in frame_word or "x" in word:
        return repeat(rng, split, language)
    return ask.format(f=frame, w=word), frame.replace("x", word)


def odd_one(rng: Random, split: Split, language: Language) -> Task:
    """Is a thing in a list?"""
    parts = _things(rng, split, language, 2, 5)
    inside = rng.random() < 0.5
    wanted = pick(rng, parts) if inside else thing(rng, split, language)
    text = _joint(rng, language).join(parts)
    found = wanted in parts
    if language == "en":
        return f"{text}\nIs {wanted} in the list?", "yes" if found else "no"
    return f"{text}\n里面有{wanted}吗？", "有" if found else "没有"


SKILLS: tuple[Callable[[Random, Split, Language], Task], ...] = (
    repeat,
    repeat,
    spell,
    count,
    nth,
    following,
    lookup,
    lookup,
    lookup,
    lookup,
    compute,
    compare,
    sequence,
    format_it,
    format_it,
    odd_one,
)


def skill(rng: Random, split: Split, language: Language) -> Task:
    """An instruction and its answer."""
    return pick(rng, SKILLS)(rng, split, language)

"""Catalogue entries (a name and its attributes), and the many layouts they can be written in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tunesmith.text.builtin.vocabulary import Language, Split, made_up, pick, product, value, words, zh_name

KEYS: dict[Language, dict[str, tuple[str, ...]]] = {
    "en": {
        "measure": words(
            "weight|height|length|width|depth|power|capacity|warranty|battery life|stock|delivery time|age|range|"
            "diameter|thickness|charging time|distance|duration|speed",
            "|",
        ),
        "price": ("price", "cost", "fee", "sale price", "deposit", "monthly rate"),
        "code": ("code", "model", "serial number", "article number", "shelf", "key", "batch", "ticket", "label"),
        "colour": ("colour", "color", "lining", "trim", "frame colour", "paint", "ribbon"),
        "material": ("material", "fabric", "base", "handle", "surface", "cover", "frame"),
        "motif": ("motif", "emblem", "pattern", "print", "badge", "sign", "logo"),
        "date": ("release date", "birthday", "date", "opening day", "first sale", "expiry date", "founded"),
        "time": ("opening time", "start", "departure", "closing time", "alarm", "time"),
        "size": ("size", "dimensions", "box size", "format"),
        "place": ("origin", "home", "city", "place", "warehouse", "birthplace", "factory", "destination"),
        "person": ("designer", "owner", "author", "maker", "friend", "teacher", "contact", "manager", "painter"),
        "word": ("brand", "nickname", "series", "password", "scent", "flavour", "title", "team", "type"),
    },
    "zh": {
        "measure": words("重量|高度|长度|宽度|深度|功率|容量|保修期|续航|库存|配送时间|年龄|直径|厚度|距离|时长", "|"),
        "price": ("价格", "售价", "费用", "优惠价", "押金", "运费"),
        "code": ("编号", "型号", "序列号", "货号", "货架", "批次", "标签", "代码"),
        "colour": ("颜色", "配色", "边框颜色", "内衬颜色", "外观颜色"),
        "material": ("材质", "面料", "底座", "把手", "表面", "外壳"),
        "motif": ("图案", "标志", "花纹", "徽章", "印花"),
        "date": ("上市日期", "生日", "日期", "生产日期", "到期日", "成立时间"),
        "time": ("开门时间", "出发时间", "关门时间", "开始时间", "闹钟"),
        "size": ("尺寸", "规格", "包装尺寸", "大小"),
        "place": ("产地", "家乡", "城市", "地点", "仓库", "工厂", "目的地"),
        "person": ("设计师", "主人", "作者", "制作人", "朋友", "老师", "联系人", "经理"),
        "word": ("品牌", "昵称", "系列", "密码", "香味", "口味", "名称", "队名"),
    },
}


@dataclass(frozen=True)
class Attribute:
    """One attribute of an entry; `kind` is the kind of its value."""

    key: str
    value: str
    kind: str


@dataclass(frozen=True)
class Entry:
    """A named thing. `reference` is the name as a sentence uses it ('the Velko lamp')."""

    name: str
    reference: str
    attributes: tuple[Attribute, ...]


def _subject(rng: Random, split: Split, language: Language) -> tuple[str, str]:
    draw = rng.random()
    if draw < 0.6:
        name = product(rng, split, language)
        return name, f"the {name}" if language == "en" and rng.random() < 0.8 else name
    name = value(rng, split, language, "person" if draw < 0.75 else "place" if draw < 0.87 else "word")
    return name, name


def _key(rng: Random, split: Split, language: Language, kind: str) -> str:
    if rng.random() < 0.06:
        return made_up(rng, split) if language == "en" else zh_name(rng, split)
    return pick(rng, KEYS[language][kind])


def keys_of(rng: Random, split: Split, language: Language, count: int) -> dict[str, str]:
    """`count` different keys with the kind of their values."""
    kinds = tuple(KEYS[language])
    keys: dict[str, str] = {}
    while len(keys) < count:
        kind = pick(rng, kinds)
        keys[_key(rng, split, language, kind)] = kind if rng.random() < 0.93 else pick(rng, kinds)
    return keys


def entry(rng: Random, split: Split, language: Language, keys: dict[str, str]) -> Entry:
    """An entry with fresh values for `keys`."""
    name, reference = _subject(rng, split, language)
    return Entry(
        name, reference, tuple(Attribute(k, value(rng, split, language, kind), kind) for k, kind in keys.items())
    )


def entries(rng: Random, split: Split, language: Language, count: int, num_keys: int) -> list[Entry]:
    """Entries with the same keys, sometimes in another order."""
    keys = keys_of(rng, split, language, num_keys)
    return [entry(rng, split, language, keys) for _ in range(count)]


def _lines(rng: Random, language: Language, group: list[Entry]) -> str:
    bullet = pick(rng, ("", "", "", "- ", "* ", "• ", "  "))
    joint = pick(rng, (": ", ": ", " = ", " - ", " | ") if language == "en" else ("：", "：", ": ", " ", "——"))
    title = pick(
        rng,
        ("{}", "{}", "# {}", "[{}]", "**{}**", "{}:") if language == "en" else ("{}", "{}", "【{}】", "# {}", "{}："),
    )
    label = pick(rng, ("", "", "name", "product", "item") if language == "en" else ("", "", "名称", "商品", "产品"))
    upper = rng.random() < 0.3 and language == "en"
    blocks = []
    for one in group:
        head = f"{bullet}{label}{joint}{one.name}" if label else title.format(one.name)
        body = (f"{bullet}{a.key.capitalize() if upper else a.key}{joint}{a.value}" for a in one.attributes)
        blocks.append("\n".join((head, *body)))
    return ("\n\n" if rng.random() < 0.6 else "\n").join(blocks)


def _inline(rng: Random, language: Language, group: list[Entry]) -> str:
    if language == "zh":
        joint, comma, shape = (
            pick(rng, ("：", "")),
            pick(rng, ("，", "；", "、")),
            pick(rng, ("{}：{}。", "{}（{}）", "{} - {}")),
        )
    else:
        joint, comma, shape = (
            pick(rng, (": ", " ", "=")),
            pick(rng, (", ", "; ", " / ")),
            pick(rng, ("{} ({})", "{}: {}.", "{} - {}")),
        )
    return "\n".join(shape.format(e.name, comma.join(a.key + joint + a.value for a in e.attributes)) for e in group)


def _json(rng: Random, language: Language, group: list[Entry]) -> str:
    label = pick(rng, ("name", "id", "title") if language == "en" else ("名称", "name", "商品"))
    rows = [{label: e.name, **{a.key: a.value for a in e.attributes}} for e in group]
    content = rows[0] if len(rows) == 1 else rows
    return json.dumps(content, ensure_ascii=False, indent=1 if rng.random() < 0.3 else None)


def _table(rng: Random, language: Language, group: list[Entry]) -> str:
    bar = pick(rng, (" | ", " | ", ", ", "\t"))
    header = [
        pick(rng, ("name", "item", "who") if language == "en" else ("名称", "商品", "项目")),
        *(a.key for a in group[0].attributes),
    ]
    rows = [header, *([e.name, *(a.value for a in e.attributes)] for e in group)]
    return "\n".join(bar.join(row) for row in rows)


_SENTENCES: dict[Language, tuple[str, ...]] = {
    "en": (
        "The {k} of {n} is {v}.",
        "{N} has the {k} {v}.",
        "Its {k} is {v}.",
        "The {k} is {v}.",
        "For {n}, the {k} is {v}.",
        "{v} is the {k} of {n}.",
        "As for the {k}, it is {v}.",
        "You will find that its {k} is {v}.",
        "Everybody knows the {k} of {n}: {v}.",
        "It comes with {v} as its {k}.",
        "{N}'s {k} is {v}.",
    ),
    "zh": (
        "{n}的{k}是{v}。",
        "它的{k}是{v}。",
        "{k}为{v}。",
        "{k}是{v}。",
        "{v}是{n}的{k}。",
        "说到{k}，是{v}。",
        "大家都知道{n}的{k}是{v}。",
        "至于{n}，{k}为{v}。",
        "{n}，{k}{v}。",
    ),
}
_OPENERS: dict[Language, tuple[str, ...]] = {
    "en": ("", "", "This is about {n}. ", "Let me tell you about {n}. ", "{N} is new here. ", "We have {n}. "),
    "zh": ("", "", "这里介绍{n}。", "我们来说说{n}。", "{n}是新来的。", "我们有{n}。"),
}


def sentence_case(text: str) -> str:
    """The text with its first letter a capital."""
    return text[:1].upper() + text[1:]


def _prose(rng: Random, language: Language, group: list[Entry]) -> str:
    paragraphs = []
    for one in group:
        upper = sentence_case(one.reference)
        opener = pick(rng, _OPENERS[language]).format(n=one.reference, N=upper)
        named, parts = bool(opener), []
        for a in one.attributes:
            form = pick(rng, _SENTENCES[language])
            while not named and "{n}" not in form and "{N}" not in form:
                form = pick(rng, _SENTENCES[language])
            parts.append(sentence_case(form.format(k=a.key, v=a.value, n=one.reference, N=upper)))
            named = True
        paragraphs.append(opener + (" " if language == "en" else "").join(parts))
    return "\n".join(paragraphs)


Layout = Callable[[Random, Language, list[Entry]], str]
LAYOUTS: tuple[Layout, ...] = (_lines, _lines, _lines, _prose, _prose, _inline, _json, _table)


def write(rng: Random, language: Language, group: list[Entry]) -> str:
    """The entries in a layout drawn at random."""
    return pick(rng, LAYOUTS)(rng, language, group)

"""Short stories about made-up heroes, in English and Chinese, with questions about what was told."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tunesmith.text.builtin.vocabulary import Language, Split, pick, value, words

_CAST: dict[Language, tuple[str, ...]] = {
    "en": words("girl boy fox bear rabbit old-man baker farmer robot mouse cat dog bird king queen sailor doctor frog"),
    "zh": words("小女孩 小男孩 狐狸 小熊 兔子 老爷爷 面包师 农夫 机器人 老鼠 小猫 小狗 小鸟 国王 王后 水手 医生 青蛙"),
}
_THINGS: dict[Language, tuple[str, ...]] = {
    "en": words("key ball book hat map stone boat bell ring cake letter box flute coin kite apple cup flower lamp"),
    "zh": words("钥匙 皮球 书 帽子 地图 石头 小船 铃铛 戒指 蛋糕 信 盒子 笛子 硬币 风筝 苹果 杯子 花 灯"),
}
_PLACES: dict[Language, tuple[str, ...]] = {
    "en": words(
        "the forest|the river|the hill|the market|the garden|the beach|the old house|the bridge|the school|the cave",
        "|",
    ),
    "zh": words("森林里|河边|山上|市场上|花园里|海边|老房子里|桥下|学校里|山洞里", "|"),
}
_FEELINGS: dict[Language, tuple[str, ...]] = {
    "en": words("happy sad proud tired hungry brave afraid curious glad surprised quiet lonely"),
    "zh": words("开心 难过 骄傲 疲惫 饥饿 勇敢 害怕 好奇 高兴 惊讶 安静 孤单"),
}
_TIMES: dict[Language, tuple[str, ...]] = {
    "en": words(
        "One morning|One evening|On a rainy day|In the spring|Last winter|One night|Every Sunday|After lunch", "|"
    ),
    "zh": words("一天早上|一天傍晚|下雨天|春天里|去年冬天|一天夜里|每个星期天|午饭后", "|"),
}
_OPENINGS: dict[Language, tuple[str, ...]] = {
    "en": (
        "Once upon a time there was a {f1} {c1} called {n1}. ",
        "There once lived a {c1} named {n1}. ",
        "{n1} was a {f1} {c1}. ",
        "In a small village lived {n1}, a {c1}. ",
        "This is the story of {n1} the {c1}. ",
    ),
    "zh": (
        "从前有一个{f1}的{c1}，名叫{n1}。",
        "很久以前，有个{c1}叫{n1}。",
        "{n1}是一个{f1}的{c1}。",
        "小村子里住着{c1}{n1}。",
        "这是{c1}{n1}的故事。",
    ),
}
_EVENTS: dict[Language, tuple[str, ...]] = {
    "en": (
        "{t}, {n1} went to {p} and found a {x1}. ",
        "{t}, {n1} lost a {x1} near {p}. ",
        "{t}, {n1} walked to {p} with a {x1}. ",
        "{t}, {n1} saw a {x1} at {p}. ",
    ),
    "zh": (
        "{t}，{n1}去{p}，找到了一个{x1}。",
        "{t}，{n1}在{p}弄丢了{x1}。",
        "{t}，{n1}带着{x1}来到{p}。",
        "{t}，{n1}在{p}看见一个{x1}。",
    ),
}
_MEETINGS: dict[Language, tuple[str, ...]] = {
    "en": (
        "There {n1} met {n2}, a {f2} {c2}. ",
        "A {c2} called {n2} came by and felt {f2}. ",
        "{n2} the {c2} was there too. ",
        "Soon {n2}, a {c2}, came along. ",
    ),
    "zh": (
        "在那里，{n1}遇见了{f2}的{c2}{n2}。",
        "有个叫{n2}的{c2}走过来，很{f2}。",
        "{c2}{n2}也在那里。",
        "不久，{c2}{n2}来了。",
    ),
}
_TALKS: dict[Language, tuple[str, ...]] = {
    "en": (
        '"Is this your {x1}?" asked {n2}. "Yes, thank you," said {n1}. ',
        '"I have a {x2}," said {n2}. "Let us play." ',
        '"Please help me," said {n2}. {n1} gave {n2} the {x2}. ',
        "They shared the {x2} and talked about the {x1}. ",
        '{n1} said, "I like your {x2}." {n2} smiled. ',
    ),
    "zh": (
        "“这是你的{x1}吗？”{n2}问。“是的，谢谢你。”{n1}说。",
        "“我有一个{x2}。”{n2}说，“我们一起玩吧。”",
        "“请帮帮我。”{n2}说。{n1}把{x2}给了{n2}。",
        "他们分享了{x2}，还聊起了{x1}。",
        "{n1}说：“我喜欢你的{x2}。”{n2}笑了。",
    ),
}
_ENDINGS: dict[Language, tuple[str, ...]] = {
    "en": (
        "At the end {n1} was {f3}. ",
        "From that day on, {n1} and {n2} were friends.",
        "{n1} went home and slept well.",
        "Then they ate together and everybody was {f3}.",
        "And {n2} kept the {x2} for ever. The end.",
    ),
    "zh": (
        "最后{n1}很{f3}。",
        "从那天起，{n1}和{n2}成了好朋友。",
        "{n1}回家睡了个好觉。",
        "后来他们一起吃饭，大家都很{f3}。",
        "{n2}一直留着那个{x2}。",
    ),
}
_QUESTIONS: dict[Language, tuple[tuple[str, str], ...]] = {
    "en": (
        ("Who is the story about?", "{n1}"),
        ("Whom did {n1} meet?", "{n2}"),
        ("Who came to {n1}?", "{n2}"),
        ("What is the {c1} called?", "{n1}"),
        ("What is {n2}?", "a {c2}"),
        ("Where did {n1} meet {n2}?", "{p}"),
        ("What did {n1} have to do with?", "a {x1}"),
        ("What was the name of the {c2}?", "{n2}"),
    ),
    "zh": (
        ("故事讲的是谁？", "{n1}"),
        ("{n1}遇见了谁？", "{n2}"),
        ("{c1}叫什么名字？", "{n1}"),
        ("{n2}是什么？", "{c2}"),
        ("他们在哪里见面？", "{p}"),
        ("那个{c2}叫什么？", "{n2}"),
    ),
}


@dataclass(frozen=True)
class Story:
    """A story and one question about it."""

    text: str
    question: str
    answer: str


def _slots(rng: Random, split: Split, language: Language) -> dict[str, str]:
    person = "person" if rng.random() < 0.3 else "word"
    names = [value(rng, split, language, person) for _ in range(2)]
    names = [n if n[:1].isupper() else n.capitalize() for n in names]
    slots = {"n1": names[0], "n2": names[1], "t": pick(rng, _TIMES[language]), "p": pick(rng, _PLACES[language])}
    slots |= {f"c{i}": pick(rng, _CAST[language]).replace("-", " ") for i in (1, 2)}
    slots |= {f"x{i}": pick(rng, _THINGS[language]) for i in (1, 2)}
    slots |= {f"f{i}": pick(rng, _FEELINGS[language]) for i in (1, 2, 3)}
    return slots


def story(rng: Random, split: Split, language: Language) -> Story:
    """A story of four to six sentences."""
    slots = _slots(rng, split, language)
    parts = [_OPENINGS, _EVENTS, _MEETINGS, *([_TALKS] * (1 + (rng.random() < 0.4))), _ENDINGS]
    text = "".join(pick(rng, part[language]).format(**slots) for part in parts).strip()
    ask, reply = pick(rng, _QUESTIONS[language])
    return Story(text, ask.format(**slots), reply.format(**slots))

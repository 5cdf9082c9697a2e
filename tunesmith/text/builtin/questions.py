"""Phrasings of questions and manners of answering; no phrasing is shared between splits.

Slots: {k} the attribute's key, {n} the name as a sentence uses it, {N} the same with a capital.
"""

from __future__ import annotations

from random import Random

from tunesmith.text.builtin.vocabulary import Language, Split, pick

_EN = {
    "pretrain": (
        "What is the {k} of {n}?",
        "What's the {k} of {n}?",
        "{N}: what is the {k}?",
        "Which {k} does {n} have?",
        "Tell me the {k} of {n}.",
        "Please give me the {k} of {n}.",
        "What {k} does {n} have?",
        "Name the {k} of {n}.",
        "Do you know the {k} of {n}?",
        "What does the text say about the {k} of {n}?",
        "{k} of {n}?",
        "I need the {k} of {n}.",
        "Find the {k} of {n}.",
        "What is {n}'s {k}?",
        "And the {k} of {n}?",
        "Say the {k} of {n}.",
        "For {n}, what is the {k}?",
        "Read the entry: what {k} is given for {n}?",
        "What is written under {k} for {n}?",
        "Look up the {k} for {n}.",
        "Hi, what {k} is {n}?",
        "Which {k} is listed for {n}?",
        "According to the text, what is the {k} of {n}?",
        "{n} - {k}?",
        "I wonder what {k} {n} has.",
        "My friend asks for the {k} of {n}.",
        "What was the {k} of {n} again?",
        "Excuse me, what is the {k} of {n}?",
        "Show me the {k} of {n}.",
        "Give the {k} for {n}, please.",
        "Extract the {k} of {n}.",
        "Question: {k} of {n}.",
        "What about the {k} of {n}?",
        "Quick: the {k} of {n}?",
    ),
    "train": (
        "Could you tell me the {k} of {n}?",
        "Hello, I would like to know the {k} of {n}.",
        "Which {k} should I note for {n}?",
        "Is there any information on the {k} of {n}?",
        "What is the exact {k} for {n}?",
        "A customer wants the {k} of {n}.",
        "What {k} do you have on file for {n}?",
        "I'm buying {n}. What is its {k}?",
        "About {n}: which {k} is it?",
        "Kindly state the {k} of {n}.",
        "Before I order {n}, what is the {k}?",
        "Can you check the {k} of {n}?",
    ),
    "heldout": (
        "Would you mind telling me the {k} of {n}?",
        "I'm curious about {n}. What {k} does it have?",
        "Let me know the {k} of {n}, thanks.",
        "May I ask which {k} {n} has?",
        "I forgot the {k} of {n}. What is it?",
        "My sister wants {n}. What would the {k} be?",
        "Good morning! What {k} is stated for {n}?",
        "Regarding {n}, please share the {k}.",
        "Help me out: the {k} of {n} is what?",
        "Any idea what the {k} of {n} is?",
    ),
}
_ZH = {
    "pretrain": (
        "{n}的{k}是什么？",
        "{n}的{k}是多少？",
        "{n}，{k}是什么？",
        "请问{n}的{k}？",
        "告诉我{n}的{k}。",
        "{n}有什么{k}？",
        "请找出{n}的{k}。",
        "我需要{n}的{k}。",
        "你知道{n}的{k}吗？",
        "文中{n}的{k}是什么？",
        "{n}的{k}？",
        "{k}：{n}？",
        "根据上文，{n}的{k}是什么？",
        "对于{n}，{k}是哪个？",
        "请说出{n}的{k}。",
        "那么{n}的{k}呢？",
        "查一下{n}的{k}。",
        "读一读，{n}的{k}写的是什么？",
        "朋友问{n}的{k}。",
        "快说，{n}的{k}是什么？",
        "提取{n}的{k}。",
        "{n}的{k}写了什么？",
        "哪一个是{n}的{k}？",
        "给我{n}的{k}。",
    ),
    "train": (
        "你好，我想知道{n}的{k}。",
        "能告诉我{n}的{k}吗？",
        "我要买{n}，它的{k}是什么？",
        "顾客想了解{n}的{k}。",
        "麻烦确认一下{n}的{k}。",
        "下单之前问一下，{n}的{k}是多少？",
        "关于{n}，{k}是怎样的？",
        "请帮我看看{n}的{k}。",
        "{n}的{k}具体是什么？",
        "资料里{n}的{k}是什么？",
    ),
    "heldout": (
        "不好意思，{n}的{k}能说一下吗？",
        "早上好，想请教{n}的{k}。",
        "我忘了{n}的{k}，是什么来着？",
        "家人想要{n}，{k}会是什么？",
        "打扰了，{n}这款的{k}是啥？",
        "我对{n}很感兴趣，{k}是？",
        "可以介绍下{n}的{k}吗？",
        "方便讲讲{n}的{k}吗？",
    ),
}
PHRASINGS: dict[Language, dict[Split, tuple[str, ...]]] = {
    "en": {**_EN, "validation": _EN["train"]},  # type: ignore[dict-item]
    "zh": {**_ZH, "validation": _ZH["train"]},  # type: ignore[dict-item]
}

# Questions that paraphrase the key: reading needs the meaning here. Pre-training only.
PARAPHRASES: dict[Language, dict[str, tuple[str, ...]]] = {
    "en": {
        "weight": ("How heavy is {n}?", "How much does {n} weigh?"),
        "height": ("How tall is {n}?", "How high is {n}?"),
        "length": ("How long is {n}?",),
        "width": ("How wide is {n}?",),
        "age": ("How old is {n}?",),
        "distance": ("How far is {n}?",),
        "speed": ("How fast is {n}?",),
        "price": ("How much is {n}?", "How much does {n} cost?"),
        "colour": ("Which color is {n}?", "What does {n} look like in colour?"),
        "material": ("What is {n} made of?",),
        "origin": ("Where does {n} come from?", "Where is {n} from?"),
        "home": ("Where does {n} live?",),
        "city": ("In which city is {n}?",),
        "owner": ("Who owns {n}?", "Whose is {n}?"),
        "designer": ("Who designed {n}?",),
        "author": ("Who wrote {n}?",),
        "maker": ("Who made {n}?",),
        "opening time": ("When does {n} open?",),
        "closing time": ("When does {n} close?",),
        "birthday": ("When was {n} born?",),
        "stock": ("How many of {n} are left?",),
        "size": ("How big is {n}?",),
    },
    "zh": {
        "重量": ("{n}有多重？",),
        "高度": ("{n}有多高？",),
        "长度": ("{n}有多长？",),
        "宽度": ("{n}有多宽？",),
        "年龄": ("{n}多大了？",),
        "距离": ("{n}有多远？",),
        "价格": ("{n}多少钱？", "{n}怎么卖？"),
        "售价": ("{n}卖多少钱？",),
        "材质": ("{n}是用什么做的？",),
        "产地": ("{n}来自哪里？", "{n}是哪里产的？"),
        "家乡": ("{n}是哪里人？",),
        "主人": ("{n}是谁的？",),
        "设计师": ("{n}是谁设计的？",),
        "作者": ("{n}是谁写的？",),
        "开门时间": ("{n}几点开门？",),
        "关门时间": ("{n}几点关门？",),
        "库存": ("{n}还剩多少？",),
        "尺寸": ("{n}有多大？",),
    },
}

# Manners of pre-training: parts before, the sentence, parts after. A shop's own manner is in `shop` and not among them.
_BEFORE = {
    "en": (
        "",
        "",
        "",
        "",
        "Sure! ",
        "Of course. ",
        "Well, ",
        "Thank you for asking. ",
        "Let me see. ",
        "Good question! ",
        "Yes: ",
        "Hello! ",
        "Dear friend, ",
        "As it is written, ",
        "{S} here. ",
        "Okay. ",
        "Here you go: ",
    ),
    "zh": (
        "",
        "",
        "",
        "",
        "好的。",
        "当然！",
        "您好，",
        "谢谢提问。",
        "让我看看。",
        "问得好！",
        "是这样的，",
        "{S}为您服务。",
        "查到了：",
    ),
}
_SENTENCE = {
    "en": (
        "{v}",
        "{v}",
        "{v}.",
        "The {k} is {v}.",
        "the {k} of {n} is {v}.",
        "It is {v}.",
        "{N} has {v} as its {k}.",
        "{k}: {v}",
        "{n}, {k}: {v}",
        "For {n} the {k} is {v}.",
        "We list {v} as the {k}.",
        "{v} is the {k} of {n}.",
        "{v}, that is the {k}.",
        "I found {v}.",
        "The answer is {v}.",
        "[{v}]",
        "* {v} *",
        '"{v}"',
        "{N} - {k} - {v}",
        "My answer: {v}.",
        "{v}! {v}!",
        "you asked about {n}; its {k} is {v}.",
        "the {k} you want is {v}.",
    ),
    "zh": (
        "{v}",
        "{v}",
        "{v}。",
        "{k}是{v}。",
        "{n}的{k}是{v}。",
        "是{v}。",
        "{k}：{v}",
        "{n}，{k}：{v}",
        "{v}就是{n}的{k}。",
        "我查到的是{v}。",
        "答案是{v}。",
        "【{v}】",
        "“{v}”",
        "{n}采用{v}作为{k}。",
        "您问的{k}是{v}。",
        "{n}—{k}—{v}",
        "回答：{v}。",
    ),
}
_AFTER = {
    "en": (
        "",
        "",
        "",
        "",
        " Thank you!",
        " Have a nice day.",
        " Greetings, {S}.",
        " Anything else?",
        " - {S}",
        " (see the list)",
        " Yours, {S}",
        " Bye!",
        " Welcome to {S}!",
        " That is all.",
        " I hope this helps.",
        " Ask {S} again any time.",
    ),
    "zh": (
        "",
        "",
        "",
        "",
        "谢谢！",
        "祝您愉快。",
        "——{S}",
        "还有别的问题吗？",
        "欢迎来到{S}！",
        "就是这样。",
        "希望有帮助。",
        "{S}敬上。",
        "再见！",
    ),
}


def question(rng: Random, split: Split, language: Language, key: str, reference: str) -> str:
    """A question for the value of `key`."""
    phrasings = PHRASINGS[language][split]
    if split == "pretrain" and rng.random() < 0.25:
        phrasings = PARAPHRASES[language].get(key, phrasings)
    upper = reference[:1].upper() + reference[1:]
    return pick(rng, phrasings).format(k=key, n=reference, N=upper)


def manner(rng: Random, language: Language) -> str:
    """A manner of answering: a template with {k}, {n}, {N}, {v} and {S}, the name of who answers."""
    return pick(rng, _BEFORE[language]) + pick(rng, _SENTENCE[language]) + pick(rng, _AFTER[language])


def answer(template: str, key: str, reference: str, value: str, speaker: str) -> str:
    """The answer in a manner, its first letter a capital unless the answer is the bare value."""
    if template == "{v}":
        return value
    upper = reference[:1].upper() + reference[1:]
    text = template.format(k=key, n=reference, N=upper, v=value, S=speaker)
    return text if text.startswith(value) else text[:1].upper() + text[1:]

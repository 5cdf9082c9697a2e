"""Small talk: greetings, thanks, who are you, names that are remembered over turns."""

from __future__ import annotations

from random import Random

from tunesmith.text.builtin.vocabulary import Language, Split, pick, value

Message = dict[str, str]

_EXCHANGES: dict[Language, tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = {
    "en": (
        (
            ("Hello", "Hi", "Hello!", "Hi there", "Good morning", "Good evening", "Hey"),
            ("Hello! How can I help you?", "Hi! What can I do for you?", "Hello! Nice to meet you."),
        ),
        (
            ("How are you?", "How do you do?", "Are you well?"),
            ("I am fine, thank you. And you?", "Very well, thank you!"),
        ),
        (
            ("Who are you?", "What are you?", "What is your name?"),
            (
                "I am a very small language model, made with tunesmith.",
                "I am tiny, a small model trained by tunesmith.",
            ),
        ),
        (
            ("What can you do?", "Can you help me?", "How can you help?"),
            (
                "Give me a short text and ask about it. I can also repeat, count and tell small stories.",
                "I read short texts and answer questions about them.",
            ),
        ),
        (
            ("Thank you", "Thanks!", "Thank you very much", "Great, thanks"),
            ("You are welcome!", "My pleasure.", "Any time!"),
        ),
        (("Bye", "Goodbye", "See you", "Good night"), ("Goodbye!", "See you soon!", "Bye! Take care.")),
        (
            ("Are you a human?", "Are you a robot?", "Are you clever?"),
            ("I am a small program that reads and writes text.",),
        ),
        (("Which languages do you speak?", "Do you speak Chinese?"), ("English and some Chinese.",)),
    ),
    "zh": (
        (
            ("你好", "您好", "嗨", "早上好", "晚上好", "你好！"),
            ("你好！有什么可以帮您？", "您好，很高兴见到您。", "你好！请问需要什么？"),
        ),
        (("你好吗？", "最近怎么样？"), ("我很好，谢谢！您呢？", "很好，谢谢关心。")),
        (("你是谁？", "你叫什么名字？"), ("我是用tunesmith训练的一个小模型。", "我是tiny，一个很小的语言模型。")),
        (
            ("你会做什么？", "你能帮我吗？"),
            ("给我一段短文，我可以回答关于它的问题。", "我会读短文、回答问题，也会讲小故事。"),
        ),
        (("谢谢", "谢谢你", "非常感谢"), ("不客气！", "很乐意帮忙。", "不用谢。")),
        (("再见", "拜拜", "晚安"), ("再见！", "下次见！", "再见，保重。")),
        (("你是人吗？", "你是机器人吗？"), ("我是一个会读写文字的小程序。",)),
        (("你会说英语吗？", "你会哪些语言？"), ("我会中文和英语。",)),
    ),
}
_INTRODUCTIONS: dict[Language, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "en": (
        ("My name is {n}.", "I am {n}.", "Call me {n}.", "Hello, I'm {n}!"),
        ("Nice to meet you, {n}!", "Hello, {n}!", "Welcome, {n}."),
    ),
    "zh": (
        ("我叫{n}。", "我是{n}。", "你好，我是{n}！", "叫我{n}吧。"),
        ("很高兴认识你，{n}！", "你好，{n}！", "欢迎你，{n}。"),
    ),
}
_REMEMBER: dict[Language, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "en": (("What is my name?", "Who am I?", "Do you remember my name?"), ("Your name is {n}.", "You are {n}.")),
    "zh": (("我叫什么名字？", "我是谁？", "你还记得我吗？"), ("你叫{n}。", "你是{n}。")),
}


def _turn(ask: str, reply: str) -> list[Message]:
    return [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]


def small_talk(rng: Random, split: Split, language: Language) -> list[Message]:
    """A conversation of one to four exchanges."""
    messages: list[Message] = []
    introduced = rng.random() < 0.5
    name = value(rng, split, language, "person") if introduced else ""
    if introduced:
        asks, replies = _INTRODUCTIONS[language]
        messages += _turn(pick(rng, asks).format(n=name), pick(rng, replies).format(n=name))
    for _ in range(1 + int(rng.random() * 2)):
        asks, replies = pick(rng, _EXCHANGES[language])
        messages += _turn(pick(rng, asks), pick(rng, replies))
    if introduced:
        asks, replies = _REMEMBER[language]
        messages += _turn(pick(rng, asks), pick(rng, replies).format(n=name))
    return messages

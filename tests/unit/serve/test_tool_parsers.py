"""Answers of every family, cut at every place: the same calls, content and thoughts, and never half a tag."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tunesmith.serve.tool_parsers import REASONINGS, AnswerParser, Delta, ParsedAnswer, join_deltas
from tunesmith.serve.tool_sections import SYNTAXES

THINK = REASONINGS["think"]
WEATHER = {"city": "北京 🌤", "note": 'a "b" \\ {x} </tool_call>', "deep": {"list": [1, {"y": None}]}}
ARGUMENTS = json.dumps(WEATHER, ensure_ascii=False)
CALL = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'
TIME = '{"name": "time", "arguments": {}}'
FENCED = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
BOTH = [("weather", WEATHER), ("time", {})]
# name, options, answer, content, calls, reasoning
CASES: list[tuple[str, dict[str, Any], str, str | None, list[Any], str | None]] = [
    ("hermes", {}, f"<tool_call>\n{CALL}\n</tool_call>", None, BOTH[:1], None),
    ("hermes", {}, f"I look.\n\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{TIME}\n</tool_call>",
     "I look.", BOTH, None),
    ("hermes", {}, f"<tool_call>{CALL}<tool_call>{TIME}", None, BOTH, None),
    ("hermes", {}, f"<tool_call>\n{CALL}\n</tool_call>\nDone.", "Done.", BOTH[:1], None),
    ("hermes", {}, '<tool_call>\n{"arguments": {"a": 1}, "name": "f"}\n</tool_call>', None, [("f", {"a": 1})], None),
    ("hermes", {}, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', None, [("f", {"a": 1})], None),
    ("hermes", {}, '<tool_call>{"name": "f", "id": 3, "x": [1]}</tool_call>', None, [("f", {})], None),
    ("hermes", {}, "a < b, <tool, <tool_calls and 你好 ", "a < b, <tool, <tool_calls and 你好 ", [], None),
    ("hermes", {}, "<tool_call>no JSON</tool_call> x", "<tool_call>no JSON</tool_call> x", [], None),
    ("hermes", {}, '<tool_call>{"say": "hi"}', '<tool_call>{"say": "hi"}', [], None),
    ("hermes", {}, "<tool_call>", "<tool_call>", [], None),
    ("hermes", {}, "ends with <tool_c", "ends with <tool_c", [], None),
    ("hermes", {"max_calls": 1}, f"<tool_call>{CALL}</tool_call><tool_call>{TIME}</tool_call>", None, BOTH[:1], None),
    ("hermes", {"reasoning": THINK}, f"<think>\nHm, <tool_call>?\n</think>\n\n<tool_call>\n{TIME}\n</tool_call>", None,
     BOTH[1:], "Hm, <tool_call>?"),
    ("hermes", {"reasoning": THINK, "in_thought": True}, "\nHm.\n\nSo\n</think>\n\n好。<think>",
     "好。<think>", [], "Hm.\n\nSo"),
    ("hermes", {"reasoning": THINK}, "\n<thin air", "\n<thin air", [], None),
    ("hermes", {"reasoning": THINK}, "<think>cut off </thi", None, [], "cut off </thi"),
    ("hermes", {"reasoning": THINK}, "<think>\n\n</think>\n\nYes.", "Yes.", [], None),
    ("llama3", {}, CALL.replace("arguments", "parameters"), None, BOTH[:1], None),
    ("llama3", {}, f"\n{CALL}; {TIME}", None, BOTH, None),
    ("llama3", {}, f"<|python_tag|>{CALL}", None, BOTH[:1], None),
    ("llama3", {}, '<|python_tag|>weather.call(city="北京", n=2)', None, [("weather", {"city": "北京", "n": 2})], None),
    ("llama3", {}, '<|python_tag|>print("hi")', '<|python_tag|>print("hi")', [], None),
    ("llama3", {}, '{"name": "Bob", "parameters": {"a": 1}}', '{"name": "Bob", "parameters": {"a": 1}}', [], None),
    ("llama3", {}, '{"name": "weather"}', '{"name": "weather"}', [], None),
    ("llama3", {}, '{"colour": "red"}  ', '{"colour": "red"}  ', [], None),
    ("llama3", {}, "{ braces } are not JSON", "{ braces } are not JSON", [], None),
    ("llama3", {}, f"It is {TIME}", f"It is {TIME}", [], None),
    ("llama3", {}, '{"name": "weath', '{"name": "weath', [], None),
    ("mistral", {}, f"[TOOL_CALLS][{CALL}, {TIME}]", None, BOTH, None),
    ("mistral", {}, f"[TOOL_CALLS] [ {CALL} ,{TIME} ]\n", None, BOTH, None),
    ("mistral", {}, f"[TOOL_CALLS]{TIME}", None, BOTH[1:], None),
    ("mistral", {}, "[TOOL_CALLS]nothing\nof it", "[TOOL_CALLS]nothing\nof it", [], None),
    ("mistral", {}, "a list [TOOL", "a list [TOOL", [], None),
    ("mistral-args", {}, f"Ok.[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]time[CALL_ID]abc[ARGS]{{}}",
     "Ok.", BOTH, None),
    ("deepseek", {}, f"Hm.<｜tool▁calls▁begin｜>{FENCED.format('weather', ARGUMENTS)}\n{FENCED.format('time', '{}')}"
     "<｜tool▁calls▁end｜>", "Hm.", BOTH, None),
    ("deepseek", {}, "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>time<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
     "<｜tool▁calls▁end｜>", None, BOTH[1:], None),
]  # fmt: skip


def parse(name: str, options: dict[str, Any], pieces: list[str]) -> tuple[ParsedAnswer, list[Delta], AnswerParser]:
    ids = iter(f"id{n}" for n in range(99))
    parser = AnswerParser(SYNTAXES[name], ("weather", "time"), make_id=lambda: next(ids), **options)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish()
    return join_deltas(deltas), deltas, parser


def cuts(text: str, seed: int) -> list[str]:
    rng, pieces, at = random.Random(seed), [], 0
    while at < len(text):
        length = rng.choice([1, 1, 2, 3, 5, 11])
        pieces.append(text[at : at + length])
        at += length
    return pieces


@pytest.mark.parametrize("case", CASES, ids=[f"{case[0]}-{number}" for number, case in enumerate(CASES)])
def test_an_answer_is_the_same_however_it_is_cut(case: tuple[Any, ...]) -> None:
    name, options, text, content, calls, reasoning = case
    for pieces in ([text], list(text), *(cuts(text, seed) for seed in range(8))):
        answer, deltas, parser = parse(name, options, pieces)
        assert answer.content == content
        assert answer.reasoning == reasoning
        assert [(call.name, json.loads(call.arguments)) for call in answer.tool_calls] == calls
        assert parser.has_calls == bool(calls)
        assert all(bool(d.content) + bool(d.reasoning) + (d.tool_call is not None) == 1 for d in deltas)
        firsts = [d.tool_call for d in deltas if d.tool_call and d.tool_call.id is not None]
        assert [(part.index, part.id) for part in firsts] == [(n, f"id{n}") for n in range(len(calls))]
        assert all(part.name for part in firsts)


def test_arguments_and_text_come_as_soon_as_they_are_certain() -> None:
    parser = AnswerParser(SYNTAXES["hermes"], ("f",), make_id=lambda: "x")
    assert parser.feed("Hello wor") == [Delta(content="Hello wor")]
    assert parser.feed("ld <to") == [Delta(content="ld")]
    assert parser.feed("ol_call>") == []
    assert parser.feed('{"name": "f", "argu') != []
    parts = [parser.feed(piece)[0].tool_call for piece in ('ments": {"a', '": "b', 'c"', "}")]
    assert [part.arguments for part in parts if part] == ['{"a', '": "b', 'c"', "}"]
    assert parser.feed("}\n</tool_") == [] and parser.feed("call>") == [] and parser.finish() == []


def test_a_call_that_is_cut_off_keeps_what_was_said_of_it() -> None:
    answer, _, parser = parse("hermes", {}, ['<tool_call>{"name": "weather", "arguments": {"city": "Be'])
    assert [(call.name, call.arguments) for call in answer.tool_calls] == [("weather", '{"city": "Be')]
    assert parser.has_calls and answer.content is None


def test_without_a_syntax_everything_is_text_at_once() -> None:
    parser = AnswerParser()
    assert parser.feed("<tool_call>  ") == [Delta(content="<tool_call>  ")]
    assert parser.finish() == []


def test_ids_are_as_the_family_s_template_wants_them() -> None:
    for name, length in (("mistral", 9), ("hermes", 29)):
        parser = AnswerParser(SYNTAXES[name], ("time",))
        calls = join_deltas(parser.feed(f"{SYNTAXES[name].begin}{TIME}") + parser.finish()).tool_calls
        assert len(calls[0].id) == length and calls[0].id.replace("_", "").isalnum()


@pytest.mark.parametrize("name", list(SYNTAXES))
def test_no_text_whatever_breaks_a_parser(name: str) -> None:
    """Random soup of tags and JSON: nothing is lost where there is no call, nothing raises."""
    bits = [
        *SYNTAXES[name].tags,
        "{",
        "}",
        '"',
        "[",
        "]",
        ",",
        ":",
        '"name": "time"',
        '"arguments": {',
        "你",
        "\\",
        " ",
        "a",
    ]
    for seed in range(80):
        rng = random.Random(seed)
        text = "".join(rng.choice(bits) for _ in range(rng.randrange(1, 18)))
        whole, _, parser = parse(name, {}, [text])
        again, _, _ = parse(name, {}, cuts(text, seed))
        assert whole == again, text
        if not parser.has_calls:
            assert whole.content == text

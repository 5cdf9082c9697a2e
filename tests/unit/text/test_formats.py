"""Rows of every format become the same conversations; what is wrong is said in words."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.text.formats import Conversation, PlainText, Preference, RowError, detect_format, to_example

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "你好"}]


@pytest.mark.parametrize(
    ("row", "format_name"),
    [
        ({"instruction": "hi", "input": "", "output": "你好"}, "alpaca"),
        ({"prompt": "hi", "completion": "你好"}, "alpaca"),
        ({"question": "hi", "answer": "你好"}, "alpaca"),
        ({"问题": "hi", "答案": "你好"}, "alpaca"),
        ({"提问": "hi", "回答": "你好"}, "alpaca"),
        ({"用户": "hi", "助手": "你好"}, "alpaca"),
        ({"指令": "hi", "输入": "", "输出": "你好"}, "alpaca"),
        ({"question": "hi", "问题": None, "答案": "你好"}, "alpaca"),
        ({"messages": [{"role": "用户", "content": "hi"}, {"role": "助手", "content": "你好"}]}, "messages"),
        ({"messages": HI}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, HI[1]]}, "messages"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "你好"}]}, "sharegpt"),
    ],
)
def test_one_conversation_in_every_format(row: dict[str, Any], format_name: str) -> None:
    assert detect_format([row]) == format_name
    assert to_example(row, format_name) == Conversation(HI)


def test_alpaca_with_input_history_and_system() -> None:
    row = {"instruction": "a", "input": "b", "output": "c", "history": [["q", "r"]], "system": "s"}
    example = to_example(row, "alpaca")
    assert isinstance(example, Conversation)
    assert [(m["role"], m["content"]) for m in example.messages] == [
        ("system", "s"), ("user", "q"), ("assistant", "r"), ("user", "a\nb"), ("assistant", "c"),
    ]  # fmt: skip


def test_chinese_keys_of_input_history_and_system() -> None:
    example = to_example({"指令": "a", "输入": "b", "输出": "c", "历史": [["q", "r"]], "系统": "s"}, "alpaca")
    assert isinstance(example, Conversation)
    assert [m["content"] for m in example.messages] == ["s", "q", "r", "a\nb", "c"]


def test_sharegpt_with_tools() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "news?"},
            {"from": "function_call", "value": '{"name": "news", "arguments": {"n": 1}}'},
            {"from": "observation", "value": "[]"},
            {"from": "gpt", "value": "none"},
        ],
        "tools": '[{"name": "news"}]',
    }
    example = to_example(row, "sharegpt")
    assert isinstance(example, Conversation)
    assert example.tools == [{"name": "news"}]
    assert example.messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "news", "arguments": {"n": 1}}}
    ]
    assert example.messages[2] == {"role": "tool", "content": "[]"}


def test_weights_and_reasoning_parts() -> None:
    parts = [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "你好"}]
    row = {"messages": [{**HI[0], "loss_weight": 0.0}, {"role": "assistant", "content": parts, "loss_weight": 0.0}]}
    example = to_example(row, "messages")
    assert isinstance(example, Conversation)
    assert example.messages[1] == {"role": "assistant", "content": "你好", "reasoning_content": "hm", "weight": 0}
    assert "weight" not in example.messages[0]


def test_preferences() -> None:
    better, worse = {"role": "assistant", "content": "你好"}, {"role": "assistant", "content": "no"}
    rows: list[dict[str, Any]] = [
        {"prompt": "hi", "chosen": "你好", "rejected": "no"},
        {"instruction": "hi", "output": "x", "chosen": "你好", "rejected": "no"},
        {
            "conversations": [{"from": "human", "value": "hi"}],
            "chosen": {"from": "gpt", "value": "你好"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        {"chosen": HI, "rejected": [HI[0], worse]},
        {"chosen_messages": HI, "rejected_messages": [HI[0], worse]},
    ]
    for row in rows:
        assert detect_format([row]) == "preference"
        assert to_example(row, "preference") == Preference(HI[:1], better, worse)


def test_text() -> None:
    assert detect_format([{"text": "a", "id": 1}, "junk"]) == "text"
    assert to_example({"text": " a"}, "text") == PlainText(" a")


def test_nothing_is_detected_in_foreign_rows() -> None:
    assert detect_format([{"review": "a"}, 3]) is None


@pytest.mark.parametrize(
    ("row", "format_name", "reason"),
    [
        ([], "alpaca", "must be an object, got a list"),
        ({"instruction": 3, "output": "a"}, "alpaca", "'instruction' must be a string, got a number"),
        ({"instruction": "", "input": " ", "output": "a"}, "alpaca", "'instruction' is empty"),
        ({"instruction": "a", "output": ""}, "alpaca", "assistant turn is empty"),
        ({"instruction": "a", "output": None}, "alpaca", "'output' must be a string, got null"),
        ({"instruction": "a"}, "alpaca", "none of the keys output"),
        ({"问题": "a", "提问": "b", "答案": "c"}, "alpaca", "both '问题' and '提问'"),
        ({"问题": "a", "答案": "b", "answer": "c"}, "alpaca", "both 'answer' and '答案'"),
        ({"问题": "a", "输入": "b", "input": "c", "答案": "d"}, "alpaca", "both 'input' and '输入'"),
        ({"问题": " ", "答案": "d"}, "alpaca", "'问题' is empty"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "alpaca", "pairs"),
        ({"messages": []}, "messages", "the conversation is empty"),
        ({"messages": HI[:1]}, "messages", "no assistant turn"),
        ({"messages": [{"role": "boss", "content": "a"}]}, "messages", "role 'boss'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "content must be"),
        ({"messages": ["a"]}, "messages", "a message must be an object"),
        ({"messages": "a"}, "messages", "must be a list, got a string"),
        ({"messages": HI, "label": True}, "messages", "KTO"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "'image_url'"),
        ({"messages": HI, "images": ["a.jpg"]}, "messages", "images"),
        ({"messages": [HI[0], {**HI[1], "weight": 0.5}]}, "messages", "weight must be 0 or 1"),
        ({"conversations": [{"from": "me", "value": "a"}]}, "sharegpt", "from 'me'"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "sharegpt", "must be JSON"),
        ({"conversations": [{"from": "human", "value": 1}]}, "sharegpt", "value must be a string"),
        ({"text": "  "}, "text", "empty"),
        ({"text": "a\ud800"}, "text", "lone surrogate"),
        ({"instruction": "a", "output": "b\udfff"}, "alpaca", "lone surrogate"),
    ],
)
def test_what_is_wrong_is_said(row: Any, format_name: str, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        to_example(row, format_name)

"""The keys that rows of questions and answers are read from."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.text.row_keys import read_columns


@pytest.mark.parametrize(
    ("rows", "format_name", "columns"),
    [
        ([{"问题": "q", "答案": "a"}] * 2, "alpaca", ["问题", "答案"]),
        ([{"指令": "q", "输入": i, "输出": "a"} for i in ("", "i")], "alpaca", ["指令", "输入", "输出"]),
        ([{"question": "q", "answer": "a", "id": 7}], "alpaca", ["question", "answer"]),
        ([{"question": "q", "答案": "a"}, {"prompt": "q", "答案": "b"}], "alpaca", ["question", "prompt", "答案"]),
        ([{"instruction": "q", "input": "", "output": "a", "system": "s"}], "alpaca", []),  # as the format's name says
        ([{"文本": "t"}], "text", ["文本"]),
        ([{"text": "t"}, "no mapping", None], "text", []),
        ([{"messages": [], "问题": "q"}], "messages", []),
    ],
)  # fmt: skip
def test_columns_are_named_where_the_format_does_not_say_them(
    rows: list[Any], format_name: str, columns: list[str]
) -> None:
    assert read_columns(rows, format_name) == columns

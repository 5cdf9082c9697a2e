"""Questions from files, and the comparison of answers."""

from __future__ import annotations

import json
import lzma
from decimal import Decimal
from pathlib import Path

import pytest

from tunesmith.bench.answers import (
    Question,
    choose_comparison,
    final_number,
    is_right,
    normalise,
    read_questions,
    wilson_interval,
)
from tunesmith.errors import DataError


def write(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("the answer is 18.", "18"),
        ("#### 70000", "70000"),
        ("so 2+2=4\n#### 1,234,567", "1234567"),
        ("3 then 5 #### 8 eggs in 2 days", "8"),
        ("it costs $3,450.50!", "3450.5"),
        ("16-3=13 and 5-3", "3"),
        ("minus: -7", "-7"),
        ("-7", "-7"),
        ("The answers are\n- 3 apples\n- 42", "42"),
        ("of −7 degrees", "-7"),
        ("a debt of -$20", "-20"),
        ("答案是１２个", "12"),
        ("18.00", "18"),
        ("1,23,4", "4"),
        ("first 9 #### none", "9"),
        ("#### 1 #### 2", "2"),
    ],
)
def test_the_final_number(text: str, number: str) -> None:
    """The hyphen of a list was once taken for a sign: 42 as the last item of a list was -42, and wrong."""
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "no number", "####", "- $"])
def test_no_number_is_none(text: str) -> None:
    assert final_number(text) is None
    assert not is_right(text, Question(("#### 0",), prompt="x"), "number")


def test_numbers_agree_with_the_labels_of_published_solutions(data_dir: Path) -> None:
    """5,276 solutions of four models to GSM8K, each labelled right or wrong by its authors."""
    path = data_dir / "gsm8k" / "example_model_solutions.jsonl.xz"
    agreed = total = 0
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            question = Question((row["ground_truth"],), prompt=row["question"])
            for solved in (value for value in row.values() if isinstance(value, dict)):
                agreed += is_right(solved["solution"], question, "number") == solved["is_correct"]
                total += 1
    assert (agreed, total) == (5276, 5276)


def test_every_gsm8k_answer_has_its_number(data_dir: Path) -> None:
    questions = read_questions(str(data_dir / "gsm8k" / "test.jsonl"))
    assert len(questions) == 1319
    assert choose_comparison(questions) == "number"
    for question in questions:
        expected = question.answers[0].split("####")[1].strip().replace(",", "")
        assert final_number(question.answers[0]) == Decimal(expected)


def test_exact_comparison_ignores_space_and_compatibility_forms() -> None:
    assert normalise("  ４５ \n元\t") == "45 元"
    question = Question(("45 元", "forty-five"), prompt="x")
    assert is_right("\n４５  元 ", question, "exact")
    assert is_right("forty-five", question, "exact")
    assert not is_right("45 元 .", question, "exact")
    assert choose_comparison([question]) == "exact"


def test_rows_of_every_kind(tmp_path: Path) -> None:
    path = write(
        tmp_path / "问题.jsonl",
        [
            {"question": "q1", "answer": "a1"},
            {"question": "q2", "answer": ["a2", "A2"], "system": "be brief"},
            {"prompt": "p3", "answer": 3},
            {"messages": [{"role": "user", "content": "q4"}], "answer": "a4"},
            {"messages": [{"role": "user", "content": "q5"}, {"role": "assistant", "content": "a5"}]},
            {"instruction": "q6", "input": "more", "output": "a6"},
            {"conversations": [{"from": "human", "value": "q7"}, {"from": "gpt", "value": "a7"}]},
        ],
    )
    read = read_questions(path)
    assert [q.text for q in read] == ["q1", "q2", "p3", "q4", "q5", "q6\nmore", "q7"]
    assert [q.answers for q in read] == [("a1",), ("a2", "A2"), ("3",), ("a4",), ("a5",), ("a6",), ("a7",)]
    assert read[1].messages[0] == {"role": "system", "content": "be brief"}
    assert read[2].prompt == "p3" and not read[2].messages
    assert all(q.messages[-1]["role"] == "user" for q in read if q.messages)
    assert read[0].plain_prompt() == "Question: q1\nAnswer:"
    assert read[1].plain_prompt() == "be brief\nQuestion: q2\nAnswer:"
    assert read[3].row.endswith("问题.jsonl:4")
    assert len(read_questions(path, 3)) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, "has no 'answer'"),
        ({"answer": "a"}, "needs 'messages', 'question' or 'prompt'"),
        ({"question": "q", "answer": ""}, "'answer' must be"),
        ({"question": "q", "answer": []}, "'answer' must be"),
        ({"messages": [{"role": "assistant", "content": "a"}], "answer": "a"}, "ask nothing"),
        ({"messages": [{"role": "user"}], "answer": "a"}, "role and a text"),
        (["not", "an", "object"], "must be an object"),
    ],
)
def test_bad_rows_are_named_with_file_and_line(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path / "q.jsonl", [{"question": "fine", "answer": "yes"}, row])
    with pytest.raises(DataError, match=rf"q\.jsonl:2: .*{message}"):
        read_questions(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no question"):
        read_questions(write(tmp_path / "q.jsonl", []))


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # R: prop.test(x, n, correct = FALSE)$conf.int
    [(8, 10, 0.4901625, 0.9433178), (0, 20, 0.0, 0.1611252), (20, 20, 0.8388748, 1.0), (50, 100, 0.4038315, 0.5961685)],
)
def test_wilson_interval_equals_published_values(right: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(right, total) == pytest.approx((low, high), abs=1e-6)


def test_wilson_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="all >= 1"):
        wilson_interval(0, 0)

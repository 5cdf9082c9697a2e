"""Rows are named so that a person finds them, in every kind of file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.bench.answers import read_questions
from tunesmith.errors import DataError
from tunesmith.recipe.schema import DataSection
from tunesmith.text.dataset import load_data
from tunesmith.text.files import find_sources
from tunesmith.text.places import make_place, name_place
from tunesmith.text.reader import read_rows
from tunesmith.text.tokenizer import Tokenizer

GOOD = {"instruction": "几点开门？", "output": "九点开门。"}
Write = Callable[..., Path]


@pytest.fixture
def one_line(tmp_path: Path) -> Write:
    """A JSON file that is one array on one line, `bad` its third row."""

    def write(bad: object, name: str = "数据.json") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps([GOOD, GOOD, bad, GOOD], ensure_ascii=False), encoding="utf-8")
        return path

    return write


def load(path: Path, tokenizer: Tokenizer, **keys: object) -> object:
    section = {"train": [str(path)], "validation_fraction": 0, "workers": 0, "cache": False, **keys}
    return load_data(DataSection.model_validate(section), tokenizer, seed=0)


def test_words_for_a_place() -> None:
    assert name_place("a.jsonl", make_place(12)) == "a.jsonl:12"
    assert name_place("a.json", make_place(1, 37)) == "a.json: row 37 (line 1)"
    assert name_place("a.parquet", make_place(0, 37)) == "a.parquet: row 37"
    assert make_place(2**32 - 1, 2**31 - 1) < 2**63


def test_rows_of_an_array_on_one_line_have_numbers(one_line: Write) -> None:
    """All were "file:1", which found none of them."""
    source = next(iter(find_sources([str(one_line(3))])))
    assert [name_place("f", row.place) for row in read_rows(source)] == [f"f: row {i} (line 1)" for i in range(1, 5)]


def test_a_bad_row_is_named_by_its_number(one_line: Write, byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"数据\.json: row 3 \(line 1\): .*output"):
        load(one_line({"instruction": "a"}), byte_tokenizer)


def test_a_skipped_row_is_named_by_its_number(one_line: Write, byte_tokenizer: Tokenizer) -> None:
    loaded = load(one_line({"instruction": "a"}), byte_tokenizer, bad_rows="skip")
    assert any("数据.json: row 3 (line 1)" in line for line in loaded.summary.lines())  # type: ignore[attr-defined]


def test_a_row_that_is_too_long_is_named_by_its_number(one_line: Write, byte_tokenizer: Tokenizer) -> None:
    path = one_line({"instruction": "a", "output": "b" * 500})
    with pytest.raises(DataError, match=r"row 3 \(line 1\): the document is longer"):
        load(path, byte_tokenizer, max_length=200, too_long="stop")


def test_a_preference_pair_is_named_by_its_number(tmp_path: Path, byte_tokenizer: Tokenizer) -> None:
    from tunesmith.text.preferences import load_preferences

    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "p.json").write_text(json.dumps([pair, {**pair, "chosen": 3}]), encoding="utf-8")
    section = DataSection(train=[str(tmp_path / "p.json")], validation_fraction=0, workers=0, cache=False)
    with pytest.raises(DataError, match=r"p\.json: row 2 \(line 1\)"):
        load_preferences(section, byte_tokenizer, seed=0)


def test_a_document_of_the_store_remembers_its_number(one_line: Write, byte_tokenizer: Tokenizer) -> None:
    loaded = load(one_line(GOOD | {"output": "十点。"}), byte_tokenizer)
    rows = [loaded.train[i].row for i in range(len(loaded.train))]  # type: ignore[attr-defined]
    assert sorted(row.rpartition("/")[2] for row in rows) == [f"数据.json: row {i} (line 1)" for i in range(1, 5)]


def test_a_bad_question_is_named_by_its_number(one_line: Write) -> None:
    with pytest.raises(DataError, match=r"row 3 \(line 1\)"):
        read_questions(str(one_line({"question": "a", "answer": None})))

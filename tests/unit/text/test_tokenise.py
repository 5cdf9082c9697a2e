"""What is looked at of the data before anything is begun."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.errors import DataError
from tunesmith.recipe.schema import DataSection
from tunesmith.text import tokenise
from tunesmith.text.tokenise import refuse_at_once

Write = Callable[..., str]
GOOD = {"instruction": "q", "output": "a"}


@pytest.fixture
def bad(write_rows: Write) -> str:
    """A file whose 101st row has no answer."""
    return write_rows([GOOD] * 100 + [{"instruction": "q"}] + [GOOD] * 5, "bad.jsonl")


def test_a_bad_row_is_found_wherever_it_lies(write_rows: Write, bad: str) -> None:
    """Only the first source's format was looked at: the rest was said after the announcement of a run."""
    good = write_rows([GOOD] * 3, "good.jsonl")
    message = r"bad\.jsonl:101: the row has none of the keys output.*--set data\.bad_rows=skip"
    for data in (DataSection(train=[good, bad]), DataSection(train=[good], validation=[bad])):
        with pytest.raises(DataError, match=message):
            refuse_at_once(data)
    refuse_at_once(DataSection(train=[good, bad], bad_rows="skip"))


def test_rows_that_training_does_not_read_are_not_judged(write_rows: Write, bad: str) -> None:
    good = write_rows([GOOD] * 3, "good.jsonl")
    refuse_at_once(DataSection(train=[bad], max_rows=100))
    refuse_at_once(DataSection(train=[good, bad], max_rows=3))
    with pytest.raises(DataError, match=r"bad\.jsonl:101"):
        refuse_at_once(DataSection(train=[good, bad], max_rows=104))


def test_of_a_large_file_only_the_beginning_is_read(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "_QUICK_BYTES", 100)
    refuse_at_once(DataSection(train=[bad]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"^no rows in .*x\.jsonl$"),
        ('{"instruction": "a", "outp\n', r"x\.jsonl:1: it is not JSON"),
        ('{"a": 1}\n', r"x\.jsonl: the format can't be told"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "isn't there yet"),
    ],
)
def test_broken_files(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        refuse_at_once(DataSection(train=[str(tmp_path / "x.jsonl")]))

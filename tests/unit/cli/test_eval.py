"""`tunesmith eval`: what a person reads of an evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.bench.quality import Accuracy, Example, QualityResult
from tunesmith.cli import console
from tunesmith.cli.eval import show


def result_of(rights: list[bool], path: Path | None = None, kept: int = 50) -> QualityResult:
    examples = [Example(f"q:{i}", f"question {i}?", ("yes",), "so", ok, "stop") for i, ok in enumerate(rights)]
    accuracy = Accuracy(
        questions="q",
        accuracy=sum(rights) / len(rights),
        low=0.0,
        high=1.0,
        num_right=sum(rights),
        num_questions=len(rights),
        num_cut=0,
        comparison="exact",
        max_new_tokens=8,
        mean_new_tokens=2.0,
        new_tokens_per_s=9.0,
        duration_s=1.0,
        examples=tuple(examples[:kept]),
    )
    return QualityResult("quality", "m", None, "native", None, accuracy, path)


def lines_of(result: QualityResult, capsys: pytest.CaptureFixture[str]) -> list[str]:
    console._console.cache_clear()
    show(result)
    console._console.cache_clear()
    return capsys.readouterr().err.splitlines()


def test_wrong_answers_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    """The bug: the first five were shown, which were right, and the wrong ones were nowhere to be seen."""
    lines = lines_of(result_of([True] * 10 + [False] * 2 + [True]), capsys)
    shown = [line for line in lines if "question" in line]
    assert shown == [
        *(f"wrong  question {i}?" for i in (10, 11)),
        *(f"right  question {i}?" for i in (0, 1, 2)),
    ]
    assert "       ... 8 more right" in lines and not any("more wrong" in line for line in lines)


def test_at_most_five_wrong_ones_and_how_many_more_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(result_of([False] * 60), capsys)
    assert sum(line.startswith("wrong") for line in lines) == 5
    assert "       ... 55 more wrong" in lines


def test_where_it_was_written_and_that_an_earlier_one_stays(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert lines_of(result_of([True], tmp_path / "quality.json"), capsys)[-1] == f"written to {tmp_path}/quality.json"
    last = lines_of(result_of([True], tmp_path / "quality-2.json"), capsys)[-1]
    assert last == f"written to {tmp_path}/quality-2.json (an earlier one named 'quality' stays)"

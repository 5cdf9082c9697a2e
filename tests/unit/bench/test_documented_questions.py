"""The questions that docs/evaluation.md shows are questions."""

from __future__ import annotations

from pathlib import Path

from tunesmith.bench.answers import is_right, read_questions

DOCUMENT = Path(__file__).parents[3] / "docs" / "evaluation.md"


def test_the_documented_file_of_questions_is_read(tmp_path: Path) -> None:
    block = DOCUMENT.read_text(encoding="utf-8").split("```json\n")[1].split("```")[0]
    path = tmp_path / "questions.jsonl"
    path.write_text(block, encoding="utf-8")
    questions = read_questions(str(path))
    assert len(questions) == len(block.splitlines())
    first, second, third, *_, last = questions
    assert is_right("  早上九点开门。\n", first, "exact") and not is_right("早上九点开门", first, "exact")
    assert is_right("Within  seven days.", second, "exact") and not is_right("within seven days.", second, "exact")
    assert [message["role"] for message in third.messages] == ["system", "user"]
    assert last.prompt == "Once upon a"

"""`tunesmith train`: what the command line makes of a recipe."""

from __future__ import annotations

from pathlib import Path

from tunesmith.cli.train import _recipe


def test_data_of_the_command_line_is_taken_as_it_is_written(tmp_path: Path) -> None:
    """Names went through Python's repr into YAML, where a backslash or a wide space became other characters."""
    names = ["it's \\n.jsonl", "全\u3000角.jsonl", 'a "b".jsonl', "x: [y] # z.txt"]
    (tmp_path / "r.yaml").write_text("data: {train: [other.jsonl]}\n", encoding="utf-8")
    assert _recipe(str(tmp_path / "r.yaml"), names, None, [], None).data.train == names
    assert _recipe("builtin:tiny", names, None, [], None).data.train == names

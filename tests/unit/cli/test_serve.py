"""`tunesmith serve`: what a model is called that nobody named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.cli.serve import default_names


def test_a_run_answers_to_its_folder_and_to_what_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug: only the path that was typed, with its folders, was the model's name."""
    (tmp_path / "runs" / "shop" / "final").mkdir(parents=True)
    (tmp_path / "runs" / "shop" / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert default_names("runs/shop") == ["shop", "runs/shop"]
    assert default_names("runs/shop/final") == ["shop", "runs/shop/final"]
    monkeypatch.chdir(tmp_path / "runs")
    assert default_names("shop") == ["shop"]
    for other in ("builtin:tiny", "Qwen/Qwen3-0.6B", str(tmp_path)):
        assert default_names(other) == [other]

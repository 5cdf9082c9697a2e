"""`tunesmith profile`: what is said of its files."""

from __future__ import annotations

from pathlib import Path

from tunesmith.cli.profile import files_text


def test_every_file_is_explained_and_how_to_open_it(tmp_path: Path) -> None:
    """The bug: all that was said at the end was a bare path."""
    for name in ("operators.txt", "trace.json.gz"):
        (tmp_path / name).touch()
    text = files_text(tmp_path)
    assert "ui.perfetto.dev" in text and "chrome://tracing" in text and "operators.json" in text
    assert "memory.svg" not in text, "it is written only where memory was followed"

"""What the verbs print with: in a pipe nothing is cut."""

from __future__ import annotations

import pytest
from rich.table import Table

from tunesmith.cli import console


def test_a_table_in_a_pipe_is_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`tunesmith merge ... | cat` cut its table at 80 columns."""
    monkeypatch.delenv("COLUMNS", raising=False)
    console._console.cache_clear()
    table = Table(box=None)
    table.add_column("步骤", no_wrap=True)
    table.add_column("value", no_wrap=True)
    table.add_row("a" * 70, "b" * 70)
    console.err.print(table)
    console._console.cache_clear()
    assert "a" * 70 in (said := capsys.readouterr().err) and "b" * 70 in said

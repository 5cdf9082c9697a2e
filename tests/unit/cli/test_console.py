"""What the verbs print with: in a pipe nothing is cut."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rich.cells import cell_len
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


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A console that is made anew, in a pipe."""
    monkeypatch.delenv("COLUMNS", raising=False)
    console._console.cache_clear()
    yield monkeypatch
    console._console.cache_clear()


def printed(capsys: pytest.CaptureFixture[str], *columns: tuple[str, bool]) -> str:
    """What stands in a pipe of a table with one row; a column: its cell, and whether it must not wrap."""
    table = Table(show_lines=True)
    for _, no_wrap in columns:
        table.add_column("entry", overflow="fold", no_wrap=no_wrap)
    table.add_row(*(text for text, _ in columns))
    console.print_table(table)
    return capsys.readouterr().err


@pytest.mark.usefixtures("piped")
def test_a_table_of_sentences_in_a_pipe_is_as_wide_as_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    """The demo's questions and answers were 200 columns wide in a log, and the doctor's findings 168."""
    words = [f"word{i}" for i in range(40)]
    said = printed(capsys, (" ".join(words), False), ("答案" * 90, False), ("short", False))
    assert max(map(cell_len, said.splitlines())) == console.TABLE_COLUMNS
    assert all(word in said for word in words)  # nothing is left out
    assert said.count("答") == 90


@pytest.mark.usefixtures("piped")
def test_what_must_not_wrap_makes_a_table_in_a_pipe_wider(capsys: pytest.CaptureFixture[str]) -> None:
    said = printed(capsys, ("a" * 80, True), ("b" * 80, True), ("c d " * 40, False))
    assert "a" * 80 in said and "b" * 80 in said


@pytest.mark.usefixtures("piped")
def test_a_command_is_whole_in_a_column_that_wraps(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    command = "mend: " + " ".join(["pip install something"] * 6)
    table.add_row("extras", "long sentence " * 20)
    table.add_row("", command)
    console.print_table(table, [command])
    assert command in capsys.readouterr().err


def test_a_terminal_has_a_width_of_its_own(piped: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    piped.setenv("COLUMNS", "70")
    said = printed(capsys, ("word " * 60, False), ("word " * 60, False))
    assert max(map(cell_len, said.splitlines())) == 70

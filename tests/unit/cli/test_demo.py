"""`tunesmith demo` stopped by Ctrl-C: its last line says what was kept where, and how to go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.cli import demo, main
from tunesmith.recipe.schema import Recipe
from tunesmith.rundir.layout import RunDir, create_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out"


def write_cells(folder: Path, count: int) -> None:
    cells = RunDir(folder / "matrix").cells
    cells.mkdir(parents=True)
    for number in range(count):
        for repeat in range(2):
            (cells / f"method{number}-gc-{repeat}.json").write_text("{}", encoding="utf-8")


def test_nothing_kept_yet(folder: Path) -> None:
    assert demo.kept_line(folder) == f"kept in {folder}: for the whole demo again: tunesmith demo"


def test_cells_and_an_unfinished_training_are_named_with_their_commands(folder: Path) -> None:
    write_cells(folder, 2)
    run = create_run(Recipe(), path=folder / "quality")
    line = demo.kept_line(folder)
    assert f"2 of 5 methods measured: tunesmith report {folder}/matrix" in line
    assert f"the training: tunesmith train --resume {folder}/quality" in line
    run.final.mkdir()
    assert f"the trained model: tunesmith chat {folder}/quality" in demo.kept_line(folder)


def test_ctrl_c_ends_with_that_line_and_130(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line was "interrupted" and nothing else."""

    def interrupted(where: Path, model: str, size: demo.Size) -> None:
        write_cells(where, 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_doctor", lambda: True)
    monkeypatch.setattr(demo, "_matrix", interrupted)
    assert main.run(["demo", "--output", str(folder)]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"tunesmith: interrupted: kept in {folder}: 3 of 5 methods measured: tunesmith report ")
    assert last.endswith("tunesmith demo")

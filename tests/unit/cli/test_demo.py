"""`tunesmith demo` stopped by Ctrl-C: its last line says what was kept where, and how to go on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tunesmith.bench.matrix import Event
from tunesmith.bench.quality import Example
from tunesmith.cli import console, demo, main
from tunesmith.cli.demo_clock import REST, DemoClock, busy_line
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


def test_the_time_left_follows_from_what_was_measured() -> None:
    """Nothing said how long the demo takes; a constant would be wrong on every other machine."""
    said: list[str] = []
    times = iter([0.0, 6.0, 10.0])
    clock = DemoClock(lambda event: None, said.append, lambda: next(times))
    for cell in (None, {}, None, {}):
        clock(Event(cast(Any, None), repeat=0, position=0, count=10, cell=cell))
    assert REST == 0.6
    assert said == [
        "  about 1 min 30 s more for the whole demo, as fast as so far (the first of 10 measurements took 6 s)",
        "  about 1 min 10 s more for the whole demo, as fast as so far",
    ]


def test_a_busy_machine_is_warned_of() -> None:
    assert busy_line({"busy_cores": 0.9, "cores": 2, "is_busy": False}) is None
    assert "keep 1.5 of its 2 cores busy" in (busy_line({"busy_cores": 1.5, "cores": 2, "is_busy": True}) or "")


def test_answers_stand_beside_the_one_that_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    """A bare "frosted orange" was marked wrong, and nothing on the screen said what had been expected."""
    console._console.cache_clear()
    example = Example(
        "x:1", "What colour?", ("The colour? frosted orange, dear guest.",), "frosted orange", False, "stop"
    )
    accuracy = SimpleNamespace(heldout=SimpleNamespace(accuracy=SimpleNamespace(examples=[example])))
    demo._side_by_side(cast(Any, accuracy), cast(Any, accuracy))
    console._console.cache_clear()
    said = capsys.readouterr().err
    assert "dear guest." in said and "✗ frosted" in said

"""Runs that chat, eval and merge can't use say what they are, and what to type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.cli.unfinished import use_checkpoint
from tunesmith.errors import RunDirError
from tunesmith.recipe.schema import Recipe
from tunesmith.rundir.layout import create_run


def test_a_bench_run_is_not_one_to_go_on_with(tmp_path: Path) -> None:
    """The bug: chat, eval and merge said that it had no trained model yet, and to resume it."""
    run = create_run(Recipe(), kind="bench", path=tmp_path / "matrix")
    with pytest.raises(RunDirError, match="is a bench run: chat, eval and merge take a training run"):
        use_checkpoint(run.path)


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_a_run_that_ended_before_its_first_checkpoint(tmp_path: Path, status: Any) -> None:
    run = create_run(Recipe(), path=tmp_path / "run")
    run.set_status(status)
    with pytest.raises(RunDirError, match="ended before its first checkpoint: nothing it learnt was kept"):
        use_checkpoint(None, run.path)


def test_what_is_no_run_or_has_its_outcome_is_left_alone(tmp_path: Path) -> None:
    run = create_run(Recipe(), path=tmp_path / "run")
    run.final.mkdir()
    assert use_checkpoint("builtin:tiny", tmp_path, run.path, None) is None

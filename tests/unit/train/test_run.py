"""What a run does around its session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.recipe.schema import Recipe
from tunesmith.train.run import train


class StoppedError(Exception):
    """Ends a run after its preflight."""


def test_cublas_is_configured_before_the_preflight(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It was set when the session was built: after the certificate's first matrix product, which is when torch looks.

    On a GPU every deterministic run whose certificate was not cached stopped at its first step.
    """
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    seen: list[str | None] = []

    def look(recipe: Recipe, run_dir: Path) -> str:
        seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        raise StoppedError

    for deterministic in (False, True):
        recipe = recipe_from_mapping({"train": {"deterministic": deterministic}, "model": {"device": "cpu"}})
        with pytest.raises(StoppedError):
            train(recipe, run_dir=tmp_path / str(deterministic), preflight=look, quiet=True)
    assert seen == [None, ":4096:8"]

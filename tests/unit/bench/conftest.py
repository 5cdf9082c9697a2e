"""A recipe that the bench can run in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.recipe.schema import Recipe


@pytest.fixture
def tiny_recipe(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> Callable[..., Recipe]:
    """A function from changed sections to a recipe on random tokens and a tiny random model."""

    def make(family: str = "qwen2", **sections: dict[str, Any]) -> Recipe:
        base: dict[str, dict[str, Any]] = {
            "model": {"path": str(tiny_model_dir(family)), "device": "cpu"},
            "data": {"format": "tokens", "max_length": 64, "max_rows": 64},
            "train": {"micro_batch_tokens": 128, "precision": "float32"},
            "bench": {"warmup_steps": 1, "steps": 4},
        }
        merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in {**base, **sections}}
        return recipe_from_mapping({**merged, "output": str(tmp_path / "runs")})

    return make

"""Jobs small enough to run in the test's own process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tunesmith.bench.peers import prepare
from tunesmith.recipe.schema import Recipe

Runner = Callable[[Mapping[str, Any], Callable[[Mapping[str, Any]], None]], dict[str, Any]]


@pytest.fixture
def peer_recipe(tiny_recipe: Callable[..., Recipe]) -> Callable[..., Recipe]:
    """A function from changed sections to a row of a tiny model: LoRA, random ids, two steps and one of warm-up."""

    def make(family: str = "qwen2", **sections: dict[str, Any]) -> Recipe:
        base: dict[str, dict[str, Any]] = {
            "method": {"kind": "lora", "rank": 4, "alpha": 8},
            "data": {"max_length": 16, "max_rows": 64, "validation_fraction": 0},
            "train": {"micro_batch_tokens": 32, "learning_rate": 1e-2},
            "bench": {"warmup_steps": 1, "steps": 2, "timeout_s": 250},
        }
        return tiny_recipe(family, **{k: {**base.get(k, {}), **sections.get(k, {})} for k in {**base, **sections}})

    return make


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A function from a recipe to what runners are given."""

    def make(recipe: Recipe, checkpoint: bool = False) -> dict[str, Any]:
        request = {
            "recipe": recipe.model_dump(mode="json"),
            "scratch": str(tmp_path),
            "checkpoint": checkpoint,
            "tokenizer": None,
        }
        return prepare.run(request, lambda _: None)

    return make


@pytest.fixture
def measured() -> Callable[[Runner, Mapping[str, Any]], dict[str, Any]]:
    """A function that runs a runner here and returns its row."""

    def run(runner: Runner, job: Mapping[str, Any]) -> dict[str, Any]:
        said: list[dict[str, Any]] = []
        result = runner(job, lambda message: said.append(dict(message)))
        return {"status": "ok", "steps": said, **result}

    return run

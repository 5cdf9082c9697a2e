"""Which runs ask for our own operations on a CPU."""

from __future__ import annotations

import pytest

from tunesmith.kernels import cpu_train
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.train.cpu_operations import prepare_cpu_operations


@pytest.mark.parametrize(
    ("device", "precision", "asks"),
    [("cpu", "float32", True), ("cpu", "bfloat16", False), ("cuda", "float32", False)],
)
def test_float32_on_a_cpu(device: str, precision: str, asks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(cpu_train, "prepare", lambda: asked.append(True))
    recipe = {"version": 1, "model": {"path": "builtin:tiny", "device": device}, "train": {"precision": precision}}
    prepare_cpu_operations(recipe_from_mapping(recipe))
    assert bool(asked) == asks

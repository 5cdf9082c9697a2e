"""Whether a run's operations on a CPU are our own compiled ones."""

from __future__ import annotations

from tunesmith.kernels import cpu_train
from tunesmith.recipe.schema import Recipe


def prepare_cpu_operations(recipe: Recipe) -> None:
    """Have this process compute by kernels/cpu_train.py where a resolved recipe trains in float32 on a CPU."""
    if recipe.model.device == "cpu" and recipe.train.precision == "float32":
        cpu_train.prepare()

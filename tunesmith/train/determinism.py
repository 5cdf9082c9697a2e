"""Whether a GPU's kernels give the same bits again."""

from __future__ import annotations

import os

from tunesmith.model.uncompiled import decide_determinism
from tunesmith.recipe.schema import Recipe, TrainSection


def set_determinism(recipe: Recipe) -> None:
    """Deterministic kernels on a GPU where the recipe wants them, and others where it does not."""
    if not recipe.model.device.startswith("cuda"):
        return
    configure_cublas(recipe.train)
    decide_determinism(recipe.train.deterministic)


def configure_cublas(train: TrainSection) -> None:
    """Give cuBLAS the workspace that determinism needs; torch looks once, at the process's first matrix product."""
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

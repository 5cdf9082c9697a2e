"""Compiling a recipe's kernels in the background, from the moment the recipe is known until they are needed.

This module imports nothing that takes long; the work is done by `warm_up_worker`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from tunesmith.kernels import compiling
from tunesmith.kernels.compiling import Compiling, can_compile, start_worker
from tunesmith.recipe.schema import Recipe

_RELEVANT = {"model": {"path", "revision", "dtype", "backend"}, "method": True, "train": True, "data": {"max_length"}}


def start_compiling(recipe: Recipe) -> Compiling | None:
    """Begin to compile the kernels of `recipe`; None where there is no NVIDIA GPU, no Triton, or nothing left to do."""
    if not _is_wanted(recipe):
        return None
    marker = marker_of(recipe)
    if marker.exists():
        return None
    return start_worker("tunesmith.verify.warm_up_worker", {"recipe": recipe.model_dump(mode="json")}, marker)


def _is_wanted(recipe: Recipe) -> bool:
    return recipe.model.backend != "transformers" and can_compile(recipe.model.device)


def marker_of(recipe: Recipe) -> Path:
    """The file that says that everything of this recipe is in Triton's cache."""
    return compiling.marker_of(recipe.model_dump(mode="json", include=cast(Any, _RELEVANT)))

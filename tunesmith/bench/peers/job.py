"""What a runner is asked to do: a resolved recipe and where the prepared things lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.checkpoint.source import resolve_model
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.recipe.schema import Recipe
from tunesmith.train.resolve import DTYPES, trained_dtype


@dataclass(frozen=True)
class Job:
    """One row for one runner.

    recipe: resolved, its max_steps the warm-up and the timed steps. batches: the file with the token ids.
    rates: the learning rate of every step. targets: the projections that get adapters, as PEFT names them.
    checkpoint: a directory with the weights, tokenizer included, for runners that can only load one; None: none made.
    """

    recipe: Recipe
    batches: Path
    rates: tuple[float, ...]
    targets: tuple[str, ...]
    checkpoint: Path | None = None

    @classmethod
    def of(cls, mapping: Mapping[str, Any]) -> Job:
        """The job that plain data describes."""
        checkpoint = mapping["checkpoint"]
        return cls(
            recipe=recipe_from_mapping(mapping["recipe"]),
            batches=Path(mapping["batches"]),
            rates=tuple(mapping["rates"]),
            targets=tuple(mapping["targets"]),
            checkpoint=None if checkpoint is None else Path(checkpoint),
        )

    def plain(self) -> dict[str, Any]:
        """The job as plain data."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "batches": str(self.batches),
            "rates": list(self.rates),
            "targets": list(self.targets),
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
        }

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device(self.recipe.model.device)

    @property
    def directory(self) -> Path:
        """The model's directory: its configuration, and its weights where they are not random."""
        return resolve_model(self.recipe.model.path, self.recipe.model.revision)

    @property
    def is_random(self) -> bool:
        """Whether the weights are drawn rather than read."""
        return self.recipe.model.weights == "random"

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are what is trained."""
        return self.recipe.method.kind in ("lora", "qlora")

    @property
    def is_checkpointed(self) -> bool:
        """Whether activations are recomputed, in whichever way the library does that best."""
        return self.recipe.train.checkpointing != "none"

    @property
    def base_dtype(self) -> torch.dtype:
        """The dtype of the model's own weights."""
        return DTYPES[self.recipe.model.dtype]

    @property
    def trained_dtype(self) -> torch.dtype:
        """The dtype of what is trained, and so of the optimiser's states."""
        return trained_dtype(self.recipe.train)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the products."""
        return DTYPES[self.recipe.train.precision]

    @property
    def needs_autocast(self) -> bool:
        """Whether weights are held in another dtype than the products', which torch calls autocast."""
        return {self.base_dtype, self.trained_dtype} != {self.compute_dtype}

"""Optimisers from a recipe's train section: AdamW, AdamW with 8-bit states, plain SGD."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tunesmith.errors import RecipeError
from tunesmith.recipe.schema import TrainSection
from tunesmith.train.adam8bit import AdamW8bit
from tunesmith.train.schedules import peak_learning_rate

Named = tuple[str, nn.Parameter]


def parameter_groups(parameters: Iterable[Named], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices (embeddings and adapters too) decay; norms, biases and every other vector don't."""
    trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    decayed = [parameter for _, parameter in trained if parameter.ndim >= 2]
    plain = [parameter for _, parameter in trained if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(parameters: Iterable[Named], settings: TrainSection) -> torch.optim.Optimizer:
    """The optimiser of `settings` over what is trained.

    Raises: RecipeError when nothing is trained.
    """
    groups = parameter_groups(parameters, settings.weight_decay)
    if not groups:
        raise RecipeError("nothing is trained: every parameter is frozen; choose another method.kind or method.targets")
    betas = (settings.beta1, settings.beta2)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=peak_learning_rate(settings))
    if settings.optimizer == "adamw8bit":
        return AdamW8bit(groups, lr=peak_learning_rate(settings), betas=betas, eps=settings.eps, weight_decay=0.0)
    fused = all(parameter.device.type in ("cpu", "cuda") for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, lr=peak_learning_rate(settings), betas=betas, eps=settings.eps, fused=fused)

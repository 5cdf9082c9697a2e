"""Optimisers from a recipe's train section: AdamW, AdamW with 8-bit states, plain SGD."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import CheckpointError, RecipeError
from tunesmith.kernels.nf4 import use_kernel
from tunesmith.model.uncompiled import spare_compiler
from tunesmith.recipe.schema import TrainSection
from tunesmith.train import adam8bit, adamw
from tunesmith.train.adam8bit import AdamW8bit
from tunesmith.train.adamw import AdamW
from tunesmith.train.schedules import peak_learning_rate

Named = tuple[str, nn.Parameter]
_METHODS = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


class _SGD(torch.optim.SGD):
    """torch's, without the wrapper around `step`, which imports the compiler only to break compiled code there."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


class _AdamW(torch.optim.AdamW):
    """torch's, without the wrapper around `step` either."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


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
    spare_compiler(*(getattr(torch.optim.Optimizer, name) for name in _METHODS))
    betas = (settings.beta1, settings.beta2)
    if settings.optimizer == "sgd":
        return _SGD(groups, lr=peak_learning_rate(settings), fused=True)
    if settings.optimizer == "adamw8bit":
        return AdamW8bit(groups, lr=peak_learning_rate(settings), betas=betas, eps=settings.eps, weight_decay=0.0)
    if any(use_kernel(parameter.device) for group in groups for parameter in group["params"]):
        return AdamW(groups, lr=peak_learning_rate(settings), betas=betas, eps=settings.eps)
    # Fused is one pass in place, and the only kind that takes its guard from the device.
    return _AdamW(groups, lr=peak_learning_rate(settings), betas=betas, eps=settings.eps, fused=True)


def initial_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """The states with which the first update of a parameter begins, on its device; none for plain SGD."""
    if isinstance(optimizer, torch.optim.SGD):
        return {}
    kind = adam8bit if isinstance(optimizer, AdamW8bit) else adamw
    return kind.initial_state(parameter)


def check_states(optimizer: torch.optim.Optimizer, name: str, parameter: Tensor, found: Mapping[str, bool]) -> None:
    """`found`: the states that a checkpoint has of a parameter, and whether each is a tensor.

    Raises: CheckpointError where they are another optimiser's.
    """
    own = initial_state(optimizer, torch.empty_like(parameter, device="meta"))
    if found and found != {key: isinstance(value, Tensor) for key, value in own.items()}:
        raise CheckpointError(
            f"the checkpoint's states of {name} are another optimiser's: set train.optimizer to what the run was "
            f"started with, or start a new run"
        )


def guarded_step(optimizer: torch.optim.Optimizer, divisor: Tensor, stopped: Tensor) -> None:
    """One update by gradient / `divisor`; none at all, step counters included, where `stopped` is 1.

    Both are float32 scalars on the parameters' device, which the host does not read. torch's fused optimisers take
    them from these two attributes, as its own loss scaler hands them over, and so does AdamW8bit. For parameters that
    wait on the host torch would copy them there without waiting, and read what has not arrived: they are fetched first.
    """
    if divisor.device.type != "cpu" and any(p.is_cpu for group in optimizer.param_groups for p in group["params"]):
        divisor, stopped = divisor.cpu(), stopped.cpu()
    optimizer.grad_scale, optimizer.found_inf = divisor, stopped  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


def take_back_step(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """An update of `parameters` did not happen: step counters that are kept on the host go back by one."""
    for parameter in parameters:
        state = optimizer.state[parameter]
        if isinstance(state.get("step"), int):
            state["step"] -= 1

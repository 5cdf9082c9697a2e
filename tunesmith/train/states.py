"""From what is in memory to a TrainingState and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tunesmith.checkpoint.state import TrainingState
from tunesmith.errors import CheckpointError
from tunesmith.train import randomness
from tunesmith.train.update import Updater


def capture_state(
    step: int, weights: Mapping[str, Tensor], updater: Updater, device: torch.device, facts: Mapping[str, Any]
) -> TrainingState:
    """The complete state after `step` steps: weights, optimiser, scaler, generators, and the caller's facts."""
    tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
    scalars: dict[str, dict[str, Any]] = {}
    for name, values in _optimizer_states(updater).items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
            else:
                scalars.setdefault(name, {})[key] = value
    generators, generator_facts = randomness.capture(device)
    tensors.update({f"rng.{name}": tensor for name, tensor in generators.items()})
    scaler = None if updater.scaler is None else vars(updater.scaler).copy()
    own = {"optimizer": scalars, "rng": generator_facts, "scaler": scaler}
    return TrainingState(step, tensors, {**facts, **own})


def restore_state(state: TrainingState, weights: Mapping[str, Tensor], updater: Updater, device: torch.device) -> None:
    """Put weights, optimiser, scaler and generators back.

    Raises: CheckpointError when the state's tensors are not those of this model.
    """
    saved = _under(state.tensors, "model.")
    _check_names(weights, saved)
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(saved[name])
    _restore_optimizer(state, updater)
    if updater.scaler is not None and state.facts.get("scaler"):
        vars(updater.scaler).update(state.facts["scaler"])
    randomness.restore(_under(state.tensors, "rng."), state.facts["rng"], device)


def _optimizer_states(updater: Updater) -> dict[str, dict[str, Any]]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in updater.module.named_parameters()}
    return {names[parameter]: values for parameter, values in updater.optimizer.state.items()}


def _restore_optimizer(state: TrainingState, updater: Updater) -> None:
    parameters = dict(updater.module.named_parameters())
    values: dict[str, dict[str, Any]] = {name: dict(scalars) for name, scalars in state.facts["optimizer"].items()}
    for full_name, tensor in _under(state.tensors, "optimizer.").items():
        name, _, key = full_name.rpartition(".")
        values.setdefault(name, {})[key] = tensor.to(parameters[name].device)
    updater.optimizer.state.clear()
    for name, entries in values.items():
        updater.optimizer.state[parameters[name]] = entries


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_names(weights: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    differing = sorted(set(weights) ^ set(saved))
    if differing:
        raise CheckpointError(f"the checkpoint is of another model or method: {differing[0]} is in one of the two only")
    for name, tensor in weights.items():
        if tensor.shape != saved[name].shape or tensor.dtype != saved[name].dtype:
            raise CheckpointError(
                f"the checkpoint is of another model: {name} is {tuple(saved[name].shape)} {saved[name].dtype} there, "
                f"{tuple(tensor.shape)} {tensor.dtype} here"
            )

"""From what is in memory to a TrainingState and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tunesmith.checkpoint.state import TrainingState
from tunesmith.errors import CheckpointError, NonFiniteError
from tunesmith.train import randomness
from tunesmith.train.host_states import HostStates
from tunesmith.train.optimizers import check_states
from tunesmith.train.update import Updater


def capture_state(
    step: int, weights: Mapping[str, Tensor], updater: Updater, device: torch.device, facts: Mapping[str, Any]
) -> TrainingState:
    """The complete state after `step` steps: weights, optimiser, scaler, generators, and the caller's facts.

    Raises: NonFiniteError when a weight is NaN or Inf: such a state must not take the place of a good one.
    """
    check_finite(step, weights)
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


def check_finite(step: int, weights: Mapping[str, Tensor]) -> None:
    """Raises: NonFiniteError when a weight is NaN or Inf."""
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(
                f"the update of step {step} made {name} NaN or infinite, so nothing of it is saved; checkpoints before "
                f"it are as they were. Lower train.learning_rate or train.weight_decay, and start again"
            )


def restore_state(state: TrainingState, weights: Mapping[str, Tensor], updater: Updater, device: torch.device) -> None:
    """Put weights, optimiser, scaler and generators back.

    Raises: CheckpointError when the state's tensors are not those of this model.
    """
    restore_weights(state, weights)
    _restore_optimizer(state, updater)
    updater.forget_failure()
    if updater.scaler is not None and state.facts.get("scaler"):
        vars(updater.scaler).update(state.facts["scaler"])
    generators = {name: state.tensors[f"rng.{name}"] for name in _under(state.tensors, "rng.")}
    randomness.restore(generators, state.facts["rng"], device)


def restore_weights(state: TrainingState, weights: Mapping[str, Tensor]) -> None:
    """Put the trained weights alone back.

    Raises: CheckpointError when the state's tensors are not those of this model.
    """
    _check_names(set(weights), set(_under(state.tensors, "model.")))
    with torch.no_grad():
        for name, tensor in weights.items():
            saved = state.tensors[f"model.{name}"]
            _check_kind(name, tensor, saved)
            tensor.copy_(saved)


def _optimizer_states(updater: Updater) -> dict[str, dict[str, Any]]:
    names: dict[Tensor, str] = {piece.local: piece.name for piece in updater.pieces}
    if isinstance(updater.optimizer, HostStates):
        updater.optimizer.settle()
    return {names[parameter]: values for parameter, values in updater.optimizer.state.items()}


def _restore_optimizer(state: TrainingState, updater: Updater) -> None:
    parameters, optimizer = {piece.name: piece.local for piece in updater.pieces}, updater.optimizer
    facts = state.facts["optimizer"].items()
    values: dict[str, dict[str, Any]] = {name: dict(scalars) for name, scalars in facts if name in parameters}
    full_names = _under(state.tensors, "optimizer.")
    keys = {name: dict.fromkeys(scalars, False) for name, scalars in values.items()}
    for full_name in full_names:
        name, _, part = full_name.partition(".part-")
        name, _, key = name.rpartition(".")
        if part:
            raise divided_otherwise(name)
        if name in parameters:  # else it is frozen now
            keys.setdefault(name, {})[key] = True
    inner = optimizer.inner if isinstance(optimizer, HostStates) else optimizer
    for name, found in keys.items():
        check_states(inner, name, parameters[name], found)
    if isinstance(optimizer, HostStates):
        optimizer.forget()
    for name, key in ((name, key) for name, found in keys.items() for key, is_tensor in found.items() if is_tensor):
        tensor, parameter = state.tensors[f"optimizer.{name}.{key}"], parameters[name]
        here = optimizer.placed(parameter, tensor) if isinstance(optimizer, HostStates) else tensor.to(parameter.device)
        values.setdefault(name, {})[key] = here
    optimizer.state.clear()
    for name, entries in values.items():
        optimizer.state[parameters[name]] = entries


def divided_otherwise(name: str) -> CheckpointError:
    """8-bit states that can't be had from a checkpoint, because their blocks would have to be cut."""
    return CheckpointError(
        f"the checkpoint's 8-bit states of {name} are divided in another way, and their blocks can't be cut: go on "
        f"with as many processes as before, or use train.optimizer adamw from the start"
    )


def _under(names: Iterable[str], prefix: str) -> list[str]:
    """The names that begin with `prefix`, without it."""
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def _check_names(here: set[str], saved: set[str]) -> None:
    differing = sorted(here ^ saved)
    if differing:
        raise CheckpointError(f"the checkpoint is of another model or method: {differing[0]} is in one of the two only")


def _check_kind(name: str, here: Tensor, saved: Tensor) -> None:
    if here.shape != saved.shape or here.dtype != saved.dtype:
        raise CheckpointError(
            f"the checkpoint is of another model: {name} is {tuple(saved.shape)} {saved.dtype} there, "
            f"{tuple(here.shape)} {here.dtype} here"
        )

"""`train.offload_optimizer`: whether it can be had, and with which copies."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial

import torch

from tunesmith.cost.memory import LEAST_MOVED_BYTES, optimizer_bytes
from tunesmith.errors import DeviceError, RecipeError
from tunesmith.hardware import available_memory_bytes
from tunesmith.model.transfer import CudaTransfer, Transfer, pinned_memory
from tunesmith.parallel.spread import Alone, Spread
from tunesmith.recipe.schema import TrainSection
from tunesmith.train.host_states import HostStates
from tunesmith.units import format_bytes

ONE_PROCESS = (
    "train.offload_optimizer is for a process alone: of several, set it to false, and use parallel.offload=cpu (with "
    "parallel.strategy=zero3) where shares of the states do not fit either"
)
_log = logging.getLogger(__name__)


def states_on_host(optimizer: torch.optim.Optimizer, train: TrainSection, spread: Spread) -> HostStates:
    """`optimizer`, its states in pinned host memory, which is taken at the first update.

    Says how much that is. Raises: RecipeError where there are no states, or several processes; DeviceError where there
    is no GPU that they could leave, or too little host memory.
    """
    device = spread.device
    if not isinstance(spread, Alone):
        raise RecipeError(ONE_PROCESS)
    if train.optimizer == "sgd":
        raise RecipeError("train.optimizer sgd has no states: use --set train.offload_optimizer=false")
    require_gpu(device)
    incoming, outgoing = copies(device)
    allocate = partial(pinned_memory, advice="use --set train.offload_optimizer=false, or train.optimizer=adamw8bit")
    states = HostStates(optimizer, incoming, outgoing, allocate, one_by_one=train.optimizer_in_backward)
    _check_host(states, train)
    return states


def require_gpu(device: torch.device) -> None:
    """Raises: DeviceError where states are in host memory already."""
    if device.type != "cuda":
        raise DeviceError(
            f"train.offload_optimizer moves optimiser states from a GPU to the host, and the device is {device}: use "
            f"--set train.offload_optimizer=false"
        )


def copies(device: torch.device) -> tuple[Transfer, Transfer]:
    """To the device and from it, beside each other."""
    return CudaTransfer(device), CudaTransfer(device)


def moved_bytes(states: HostStates, train: TrainSection) -> int:
    """Host memory that the states will take."""
    moved = [parameter for parameter in _parameters(states) if states.is_moved(parameter)]
    return sum(optimizer_bytes(p.numel(), train.optimizer, p.element_size()) for p in moved)


def _check_host(states: HostStates, train: TrainSection) -> None:
    need, free = moved_bytes(states, train), available_memory_bytes()
    said = f"train.offload_optimizer takes {format_bytes(need)} of pinned host memory"
    if need > free:
        raise DeviceError(f"{said}, and {format_bytes(free)} are free: use {_smaller(states, train)}")
    if not need:
        _log.warning(
            "train.offload_optimizer moves nothing here: no trained tensor has %s, as adapters mostly don't",
            format_bytes(LEAST_MOVED_BYTES),
        )
        return
    _log.info("%s (%s are free)", said, format_bytes(free))


def _smaller(states: HostStates, train: TrainSection) -> str:
    """What would take less."""
    ways = []
    if train.optimizer == "adamw":
        ways.append("--set train.optimizer=adamw8bit")
    if any(parameter.dtype == torch.float32 for parameter in _parameters(states)):
        ways.append("--set train.master_weights=compute (states in the compute dtype)")
    return ", or ".join([*ways, "a host with more memory"])


def _parameters(states: HostStates) -> Iterable[torch.Tensor]:
    return (parameter for group in states.param_groups for parameter in group["params"])

"""Bytes of what training holds, by owner, counted on the live module and its optimiser."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tunesmith.model.lora import Adapter
from tunesmith.train.host_states import HostStates


def owner_bytes(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes on the device of weights (buffers such as NF4 codes included), adapters, gradients and optimiser states.

    A gradient has the dtype and shape of its parameter, and all of them are alive together at the end of a backward
    pass, whether or not they are at this moment.
    """
    adapters = adapter_tensors(module)
    held = {id(tensor) for tensor in adapters}
    weights = [tensor for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in held]
    return {
        "weights_bytes": storage_bytes(weights),
        "adapters_bytes": storage_bytes(adapters),
        "gradients_bytes": sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad),
        "optimizer_bytes": storage_bytes(optimizer_tensors(optimizer)),
    }


def adapter_tensors(module: nn.Module) -> list[Tensor]:
    """The parameters of all adapters."""
    return [p for child in module.modules() if isinstance(child, Adapter) for p in child.parameters()]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors of an optimiser's state, but for those that were moved to host memory."""
    held = [(p, value) for p, state in optimizer.state.items() for value in state.values() if isinstance(value, Tensor)]
    if isinstance(optimizer, HostStates):
        return [value for parameter, value in held if not optimizer.is_on_host(parameter, value)]
    return [value for _, value in held]


def host_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimiser's states that were moved to host memory (`train.offload_optimizer`)."""
    return optimizer.host_bytes if isinstance(optimizer, HostStates) else 0


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each counted once."""
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(sizes.values())


def with_activations(owners: dict[str, int], allocated_peak_bytes: int | None) -> dict[str, int | None]:
    """`owners` and what is left of the measured peak: activations and passing buffers; None where there is no peak."""
    rest = None if allocated_peak_bytes is None else max(0, allocated_peak_bytes - sum(owners.values()))
    return {**owners, "activations_bytes": rest}

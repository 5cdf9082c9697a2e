"""Bytes of what training holds, by owner, counted on the live module and its optimiser."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tunesmith.model.lora import Adapter


def owner_bytes(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of weights (buffers such as NF4 codes included), adapters, gradients and optimiser states.

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
    """The tensors of an optimiser's state."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each counted once."""
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(sizes.values())


def with_activations(owners: dict[str, int], allocated_peak_bytes: int | None) -> dict[str, int | None]:
    """`owners` and what is left of the measured peak: activations and passing buffers; None where there is no peak."""
    rest = None if allocated_peak_bytes is None else max(0, allocated_peak_bytes - sum(owners.values()))
    return {**owners, "activations_bytes": rest}

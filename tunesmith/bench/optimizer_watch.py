"""What the optimiser of a session does: its seconds on the device, and the bytes that it and its gradients hold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.bench.owners import adapter_tensors, optimizer_tensors, storage_bytes
from tunesmith.train.session import Session

_Mark = torch.cuda.Event | float


class OptimizerWatch:
    """Hooks around a session's optimiser; a context manager."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._device = session.device
        self._marks: list[tuple[_Mark, _Mark]] = []
        self._began: _Mark = 0.0
        self._hooks: list[Any] = []
        self.states: dict[str, int] | None = None
        """Bytes by owner as this process holds them when it updates; None before an update."""

    def __enter__(self) -> OptimizerWatch:
        optimizer = self._session.optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def restart(self) -> None:
        """What was timed before does not count."""
        self._marks.clear()

    def seconds(self) -> float | None:
        """The median update, in seconds of the device; None where none was seen (updates in the backward pass)."""
        found = [_between(began, ended) for began, ended in self._marks]
        return statistics.median(found) if found else None

    def _before(self, *_: object) -> None:
        self._began = self._mark()

    def _after(self, *_: object) -> None:
        self._marks.append((self._began, self._mark()))
        if self.states is None:
            self.states = held_bytes(self._session.module, self._session.optimizer)

    def _mark(self) -> _Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _between(began: _Mark, ended: _Mark) -> float:
    if isinstance(began, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
        ended.synchronize()
        return float(began.elapsed_time(ended)) / 1000
    assert isinstance(began, float)
    assert isinstance(ended, float)
    return ended - began


def held_bytes(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of storages by owner, of shards what is held here; gradients as they are at this moment.

    Masters that are no parameters of the module, as DeepSpeed has them, count as the optimiser's.
    """
    adapters = adapter_tensors(module)
    kept = {id(tensor) for tensor in adapters}
    weights = [tensor for tensor in (*module.parameters(), *module.buffers()) if id(tensor) not in kept]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    held = {tensor.untyped_storage().data_ptr() for tensor in map(_local, (*weights, *adapters))}
    masters = [p for p in parameters if _local(p).untyped_storage().data_ptr() not in held]
    return {
        "weights_bytes": storage_bytes(map(_local, weights)),
        "adapters_bytes": storage_bytes(map(_local, adapters)),
        "gradients_bytes": storage_bytes(_gradients(parameters)),
        "optimizer_bytes": storage_bytes(map(_local, [*masters, *optimizer_tensors(optimizer)])),
    }


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]


def _local(tensor: Tensor) -> Tensor:
    """A shard's own values; any other tensor as it is."""
    from torch.distributed.tensor import DTensor

    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return getattr(tensor, "ds_tensor", tensor)  # DeepSpeed's ZeRO-3

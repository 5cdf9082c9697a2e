"""The optimiser inside the backward pass: a parameter is updated when its gradient is whole, which then goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tunesmith.kernels.grad_norm import global_norm
from tunesmith.train.guard import Guard
from tunesmith.train.optimizers import guarded_step


class UpdatesInBackward:
    """Of all gradients, only those between a product and its parameter's update exist at once.

    There is no clipping by a global norm, which is known only after the last gradient. A loss that is not finite stops
    every update, since it is known before the first gradient. A gradient that is not finite stops its own parameter's
    update and all that come after it; parameters before it (nearer to the loss) have been updated by then.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, guard: Guard) -> None:
        self._optimizer, self._guard = optimizer, guard
        self._groups: dict[Tensor, dict[str, Any]] = {}
        self._norms: list[Tensor] = []
        self._divisor = torch.ones_like(guard.stopped)
        self.updated: list[Tensor] = []

    @contextmanager
    def during(self, loss: Tensor, divisor: float) -> Iterator[None]:
        """A backward pass of `loss` within this context updates what it reaches, by gradient / `divisor`."""
        self._guard.look(loss.detach())
        self._divisor, self._norms, self.updated = torch.full_like(self._guard.stopped, divisor), [], []
        # A parameter's group is looked up anew: a learning rate belongs to the step.
        self._groups = {p: group for group in self._optimizer.param_groups for p in group["params"]}
        handles = [parameter.register_post_accumulate_grad_hook(self._update) for parameter in self._groups]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def norm(self) -> Tensor:
        """The 2-norm over all gradients of the pass, before the division; a float32 scalar on the device."""
        return torch.linalg.vector_norm(torch.stack(self._norms)) if self._norms else torch.zeros_like(self._divisor)

    def _update(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        norm = global_norm([parameter.grad]).to(self._divisor.device)
        self._norms.append(norm)
        self.updated.append(parameter)
        self._guard.look(norm)
        groups = self._optimizer.param_groups
        self._optimizer.param_groups = [{**self._groups[parameter], "params": [parameter]}]
        try:
            guarded_step(self._optimizer, self._divisor, self._guard.stopped)
        finally:
            self._optimizer.param_groups = groups
        parameter.grad = None

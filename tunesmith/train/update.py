"""One optimiser step of any module: accumulate, look, clip, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from tunesmith.errors import NonFiniteError
from tunesmith.recipe.schema import TrainSection
from tunesmith.train.optimizers import make_optimizer
from tunesmith.train.scaler import LossScaler
from tunesmith.train.schedules import learning_rate

Batch = TypeVar("Batch")
LossFunction = Callable[[nn.Module, Batch], tuple[Tensor, int]]


@dataclass(frozen=True)
class Update:
    """What one step did. loss: mean over the counted items of the whole window."""

    loss: float
    count: int
    grad_norm: float
    learning_rate: float
    skipped: bool


class Updater:
    """The optimiser, its schedule and the loss scale of one module.

    The gradient of a window is that of (sum of losses) / (number of counted items), however it is cut into batches.
    """

    def __init__(self, module: nn.Module, settings: TrainSection, total_steps: int) -> None:
        self.module = module
        self.settings = settings
        self.total_steps = total_steps
        self.optimizer = make_optimizer(module.named_parameters(), settings)
        self.scaler = LossScaler() if settings.precision == "float16" else None

    def step(
        self,
        number: int,
        window: Sequence[Batch],
        loss: LossFunction[Batch],
        *,
        denominator: int | None,
        describe: Callable[[Batch], str],
    ) -> Update:
        """Update number `number` (from 0) on the batches of `window`.

        Args:
            denominator: the items counted in the whole window where that is known before (their loss is then divided
                at once); None: the gradients are divided at the end.
            describe: names a batch, for the error message.

        Raises: NonFiniteError before anything is updated when a loss or a gradient is NaN or Inf.
        """
        self.optimizer.zero_grad(set_to_none=True)
        scale = self.scaler.scale if self.scaler is not None else 1.0
        losses, counts = [], []
        for batch in window:
            loss_sum, count = loss(self.module, batch)
            (loss_sum * (scale / (denominator or 1))).backward()
            losses.append(loss_sum.detach().float())
            counts.append(count)
        total = sum(counts) if denominator is None else denominator
        divisor = scale * (total if denominator is None else 1)
        return self._apply(number, window, losses, total, divisor, describe)

    def _apply(
        self,
        number: int,
        window: Sequence[Batch],
        losses: list[Tensor],
        total: int,
        divisor: float,
        describe: Callable[[Batch], str],
    ) -> Update:
        if total == 0:
            raise NonFiniteError(f"step {number + 1}: no item of the batch is counted in the loss")
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        # The step's only wait for the device: nothing may be updated before these numbers are known to be finite.
        *values, raw_norm = torch.stack([*losses, global_norm(gradients)]).tolist()
        for batch, value in zip(window, values, strict=True):
            if not math.isfinite(value):
                raise NonFiniteError(self._message(number, f"the loss is {value}", describe(batch)))
        norm = raw_norm / divisor
        rate = learning_rate(self.settings, number, self.total_steps)
        overflow = not math.isfinite(norm)
        if overflow and self.scaler is None:
            names = "; ".join(describe(batch) for batch in window)
            raise NonFiniteError(self._message(number, f"the gradient norm is {norm}", names))
        if self.scaler is not None:
            self.scaler.update(overflow)
        if not overflow:
            self._update(gradients, clip_factor(norm, self.settings.max_grad_norm) / divisor, rate)
        return Update(sum(values) / total, total, norm, rate, overflow)

    def _update(self, gradients: list[Tensor], factor: float, rate: float) -> None:
        if factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _message(self, number: int, what: str, batch: str) -> str:
        return (
            f"step {number + 1}: {what}; nothing was updated. Batch: {batch}. "
            "Lower train.learning_rate, look at these rows, or set train.detect_anomaly: true"
        )


def global_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm over all gradients, a float32 scalar on their device."""
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients are multiplied by so that their global norm is at most `max_norm` (0: no limit)."""
    return max_norm / norm if max_norm and norm > max_norm else 1.0

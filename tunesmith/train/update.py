"""One optimiser step of any module: accumulate, look, clip, update. The host does not wait for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from tunesmith.errors import NonFiniteError
from tunesmith.recipe.schema import TrainSection
from tunesmith.train.guard import Guard, gradient_divisor
from tunesmith.train.optimizers import guarded_step, make_optimizer, take_back_steps
from tunesmith.train.pending import HostCopy, Pending, reads_late
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


class PendingUpdate(Pending[Update]):
    """An update that was queued. count: the counted items of its window, which the host knows already."""

    def __init__(self, read: Callable[[], Update], count: int, *, is_ready: bool) -> None:
        super().__init__(read, is_ready=is_ready)
        self.count = count


@dataclass(frozen=True)
class _Sent(Generic[Batch]):
    """A step that was queued. numbers: the losses, the norm, whether the guard had stopped; place: steps before it."""

    number: int
    window: Sequence[Batch]
    describe: Callable[[Batch], str]
    numbers: HostCopy
    total: int
    divisor: float
    rate: float
    place: int


class Updater:
    """The optimiser, its schedule and the loss scale of one module.

    The gradient of a window is that of (sum of losses) / (number of counted items), however it is cut into batches.

    `submit` queues a step: the clip factor and whether all is finite are computed on the device, where the optimiser
    divides by the one and is switched off by the other. A step that is not finite changes nothing, nor does one queued
    after it; reading it raises. Only float16's loss scale needs the host to wait for each step.
    """

    def __init__(self, module: nn.Module, settings: TrainSection, total_steps: int) -> None:
        self.module = module
        self.settings = settings
        self.total_steps = total_steps
        self.optimizer = make_optimizer(module.named_parameters(), settings)
        self.scaler = LossScaler() if settings.precision == "float16" else None
        self.device = self.optimizer.param_groups[0]["params"][0].device
        self.guard = Guard(self.device)
        self._queued = 0

    def step(
        self,
        number: int,
        window: Sequence[Batch],
        loss: LossFunction[Batch],
        *,
        denominator: int | None,
        describe: Callable[[Batch], str],
    ) -> Update:
        """`submit`, waited for. After a NonFiniteError a caller may go on with another step."""
        try:
            return self.submit(number, window, loss, denominator=denominator, describe=describe).read()
        except NonFiniteError:
            self.guard.clear()
            raise

    def submit(
        self,
        number: int,
        window: Sequence[Batch],
        loss: LossFunction[Batch],
        *,
        denominator: int | None,
        describe: Callable[[Batch], str],
    ) -> PendingUpdate:
        """Queue update number `number` (from 0) on the batches of `window`.

        Args:
            denominator: the items counted in the whole window where that is known before (their loss is then divided
                at once); None: the gradients are divided at the end.
            describe: names a batch, for the error message.

        Reading raises: NonFiniteError when a loss or a gradient is NaN or Inf; neither this step nor a later one has
        updated anything then.
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
        if total == 0:
            raise NonFiniteError(f"step {number + 1}: no item of the batch is counted in the loss")
        divisor = scale * (total if denominator is None else 1)
        rate = learning_rate(self.settings, number, self.total_steps)
        numbers = self._queue(losses, divisor, rate)
        sent = _Sent(number, window, describe, numbers, total, divisor, rate, self._queued - 1)
        return self._pending(sent)

    def forget_failure(self) -> None:
        """Weights and states were put back to a good step: updates happen again."""
        self.guard.clear()

    def _queue(self, losses: list[Tensor], divisor: float, rate: float) -> HostCopy:
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = global_norm(gradients).to(self.device)
        numbers = torch.stack([*losses, norm])
        self.guard.look(numbers)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        divisor_on_device = gradient_divisor(norm, divisor, self.settings.max_grad_norm)
        guarded_step(self.optimizer, divisor_on_device, self.guard.stopped)
        self.optimizer.zero_grad(set_to_none=True)
        self._queued += 1
        return HostCopy(torch.cat([numbers, self.guard.stopped[None]]))

    def _pending(self, sent: _Sent[Batch]) -> PendingUpdate:
        if self.scaler is None:
            return PendingUpdate(partial(self._read, sent), sent.total, is_ready=not reads_late(self.device))
        update = self._read(sent)  # the scale of the next loss depends on it
        return PendingUpdate(lambda: update, sent.total, is_ready=True)

    def _read(self, sent: _Sent[Batch]) -> Update:
        *values, raw_norm, stopped = sent.numbers.read()
        for batch, value in zip(sent.window, values, strict=True):
            if not math.isfinite(value):
                raise self._failed(sent, f"the loss is {value}", sent.describe(batch))
        norm = raw_norm / sent.divisor
        overflow = not math.isfinite(norm)
        if overflow and self.scaler is None:
            names = "; ".join(sent.describe(batch) for batch in sent.window)
            raise self._failed(sent, f"the gradient norm is {norm}", names)
        if self.scaler is not None:
            self._adapt_scale(overflow)
        elif stopped:
            raise NonFiniteError(
                f"step {sent.number + 1}: an earlier step was not finite, and nothing was updated since"
            )
        return Update(sum(values) / sent.total, sent.total, norm, sent.rate, overflow)

    def _adapt_scale(self, overflow: bool) -> None:
        assert self.scaler is not None
        if overflow:
            self.guard.clear()
            take_back_steps(self.optimizer, 1)
        self.scaler.update(overflow)

    def _failed(self, sent: _Sent[Batch], what: str, batch: str) -> NonFiniteError:
        """The error of a step that is not finite; step counters that the host keeps go back to before it."""
        take_back_steps(self.optimizer, self._queued - sent.place)
        self._queued = sent.place
        return NonFiniteError(
            f"step {sent.number + 1}: {what}; nothing was updated. Batch: {batch}. "
            "Lower train.learning_rate, look at these rows, or set train.detect_anomaly: true"
        )


def global_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm over all gradients, a float32 scalar on their device."""
    if not gradients:
        return torch.zeros(())
    norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))

"""One optimiser step of any module: accumulate, look, clip, update. The host does not wait for the device."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from tunesmith.errors import NonFiniteError
from tunesmith.kernels.grad_norm import global_norm as global_norm
from tunesmith.model.autograd_threads import wake_autograd
from tunesmith.parallel.spread import Alone, Spread
from tunesmith.recipe.schema import TrainSection
from tunesmith.train.guard import Guard, gradient_divisor
from tunesmith.train.in_backward import UpdatesInBackward
from tunesmith.train.optimizer_offload import states_on_host
from tunesmith.train.optimizers import guarded_step, make_optimizer, take_back_step
from tunesmith.train.pending import HostCopy, Pending, reads_late
from tunesmith.train.scaler import LossScaler
from tunesmith.train.schedules import learning_rate

Batch = TypeVar("Batch")
# Steps that may be under way when it turns out that one did not happen.
MOST_UNDER_WAY = 8
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
    """A step that was queued.

    numbers: the losses, their sum over all processes, the norm, whether the guard had stopped; place: steps before it.
    """

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

    def __init__(
        self, module: nn.Module, settings: TrainSection, total_steps: int, spread: Spread | None = None
    ) -> None:
        self.module = module
        self.settings = settings
        self.total_steps = total_steps
        self.spread: Spread = Alone(module) if spread is None else spread
        self.pieces = self.spread.pieces()
        self.optimizer = make_optimizer(((piece.name, piece.local) for piece in self.pieces), settings)
        if settings.offload_optimizer:
            self.optimizer = states_on_host(self.optimizer, settings, self.spread)
        self.scaler = LossScaler() if settings.precision == "float16" else None
        self.device = self.spread.device
        wake_autograd(self.device)
        self.guard = Guard(self.device)
        self.before_update: Callable[[], None] = _nothing
        self._in_backward: UpdatesInBackward | None = None
        if settings.optimizer_in_backward:
            self._in_backward = UpdatesInBackward(self.optimizer, self.guard)
        self._queued = 0
        self._updated: deque[list[Tensor]] = deque(maxlen=MOST_UNDER_WAY)

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

        Raises: NonFiniteError when no item is counted. Reading raises: NonFiniteError when a loss or a gradient is NaN
        or Inf; neither this step nor a later one has updated anything then (see UpdatesInBackward for its exception).
        """
        self.spread.clear()
        rate = learning_rate(self.settings, number, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        take = self._update_after if self._in_backward is None else self._update_within
        numbers, total, divisor = take(number, window, loss, denominator)
        copy = HostCopy(torch.cat([numbers, self.guard.stopped[None]]))
        sent = _Sent(number, window, describe, copy, total, divisor, rate, self._queued)
        self._queued += 1
        return self._pending(sent)

    def forget_failure(self) -> None:
        """Weights and states were put back to a good step: updates happen again."""
        self.guard.clear()

    def _update_after(
        self, number: int, window: Sequence[Batch], loss: LossFunction[Batch], denominator: int | None
    ) -> tuple[Tensor, int, float]:
        """Accumulate, then update. Returns the losses and the norm on the device, the items, the norm's divisor."""
        scale = self.scaler.scale if self.scaler is not None else 1.0
        losses, counts = self.spread.backward(loss, window, scale / (denominator or 1))
        self.spread.collect()
        total = _counted(number, self.spread.count(sum(counts)) if denominator is None else denominator)
        divisor = scale * (total if denominator is None else 1)
        with_gradient = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = self.spread.norm(with_gradient).to(self.device)
        numbers = torch.stack([*losses, self.spread.total(torch.stack(losses).sum()), norm])
        self.guard.look(numbers)
        self.before_update()
        guarded_step(self.optimizer, gradient_divisor(norm, divisor, self.settings.max_grad_norm), self.guard.stopped)
        self._updated.append(with_gradient)
        self.spread.clear()
        return numbers, total, divisor

    def _update_within(
        self, number: int, window: Sequence[Batch], loss: LossFunction[Batch], denominator: int | None
    ) -> tuple[Tensor, int, float]:
        """As `_update_after`, of a window of one batch, each parameter being updated in the backward pass."""
        assert self._in_backward is not None
        (batch,) = window
        loss_sum, count = loss(self.module, batch)
        total = _counted(number, count if denominator is None else denominator)
        divisor = 1.0 if denominator is not None else float(total)
        with self._in_backward.during(loss_sum, divisor):
            (loss_sum * (1.0 / (denominator or 1))).backward()
        self._updated.append(self._in_backward.updated)
        value = loss_sum.detach().float()
        return torch.stack([value, value, self._in_backward.norm()]), total, divisor

    def _pending(self, sent: _Sent[Batch]) -> PendingUpdate:
        if self.scaler is None:
            return PendingUpdate(partial(self._read, sent), sent.total, is_ready=not reads_late(self.device))
        update = self._read(sent)  # the scale of the next loss depends on it
        return PendingUpdate(lambda: update, sent.total, is_ready=True)

    def _read(self, sent: _Sent[Batch]) -> Update:
        *values, shared, raw_norm, stopped = sent.numbers.read()
        for batch, value in zip(sent.window, values, strict=True):
            if not math.isfinite(value):
                raise self._failed(sent, f"the loss is {value}", sent.describe(batch))
        if not math.isfinite(shared):
            raise self._failed(sent, f"the loss of another process is {shared}", "in that process's message")
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
        loss = sum(values) if isinstance(self.spread, Alone) else shared
        return Update(loss / sent.total, sent.total, norm, sent.rate, overflow)

    def _adapt_scale(self, overflow: bool) -> None:
        assert self.scaler is not None
        if overflow:
            self.guard.clear()
            take_back_step(self.optimizer, self._updated.pop())
        self.scaler.update(overflow)

    def _failed(self, sent: _Sent[Batch], what: str, batch: str) -> NonFiniteError:
        """The error of a step that is not finite; step counters that the host keeps go back to before it."""
        for _ in range(min(self._queued - sent.place, len(self._updated))):
            take_back_step(self.optimizer, self._updated.pop())
        self._queued = sent.place
        return NonFiniteError(
            f"step {sent.number + 1}: {what}; {self._consequence(what)}. Batch: {batch}. "
            "Lower train.learning_rate, look at these rows, or set train.detect_anomaly: true"
        )

    def _consequence(self, what: str) -> str:
        if self._in_backward is None or what.startswith("the loss"):
            return "nothing was updated"
        return "parameters whose gradients came before were updated, so go on from the last checkpoint"


def _nothing() -> None:
    return None


def _counted(number: int, total: int) -> int:
    if total == 0:
        raise NonFiniteError(f"step {number + 1}: no item of the batch is counted in the loss")
    return total

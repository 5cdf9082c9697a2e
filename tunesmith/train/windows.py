"""The batches of each optimiser step of `fit`: an epoch's come from the caller, their windows from the background."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, cast

import torch

from tunesmith.errors import DataError
from tunesmith.recipe.schema import TrainSection
from tunesmith.train import randomness
from tunesmith.train.order import auto_epochs
from tunesmith.train.prefetch import Prefetcher
from tunesmith.train.update import Batch
from tunesmith.units import ceil_div


@dataclass(frozen=True)
class Filler(Generic[Batch]):
    """A batch that goes through the module and counts nothing: where another process has one more."""

    batch: Batch


@dataclass(frozen=True)
class Part:
    """Which of the processes that see other batches this is. width: batches of a step, of all; None: accumulation."""

    index: int = 0
    count: int = 1
    width: int | None = None


@dataclass(frozen=True)
class BatchWindow(Generic[Batch]):
    """The batches of one step that are this process's, and where in the run it is, in epochs."""

    batches: tuple[Batch | Filler[Batch], ...]
    epoch_position: float
    ends_epoch: bool


class BatchWindows(Generic[Batch]):
    """The windows of every step.

    `batches` is called in the thread that takes windows, with every global generator seeded for its epoch and put
    back afterwards: what it draws depends on seed and epoch alone, so that a resumed run draws the same, and so does
    every process. Of several, each takes every so-maniest batch of a window, and asks for no other.
    """

    def __init__(
        self,
        batches: Callable[[int], Sequence[Batch]],
        settings: TrainSection,
        device: torch.device,
        part: Part | None = None,
    ) -> None:
        self._make, self._settings, self._device = batches, settings, device
        self._part = part or Part()
        self.width = self._part.width or settings.accumulation
        self._epoch, self._batches = 0, self._draw(0)
        if len(self._batches) == 0:
            raise DataError("there is no batch to train on: `batches` is empty")
        self._steps_per_epoch = ceil_div(len(self._batches), self.width)
        self.total_steps = settings.max_steps or math.ceil(
            auto_epochs(settings, self._steps_per_epoch) * self._steps_per_epoch
        )
        self._prefetcher: Prefetcher[BatchWindow[Batch]] | None = None

    def take(self, step: int) -> tuple[BatchWindow[Batch], float]:
        """The window of a step (each is taken once, in order, or after `close`), and the seconds it was waited for."""
        began = time.perf_counter()
        epoch = step // self._steps_per_epoch
        if self._prefetcher is None or epoch != self._epoch:
            self._start(epoch, step)
        assert self._prefetcher is not None
        window, _ = self._prefetcher.take()
        return window, time.perf_counter() - began

    def close(self) -> None:
        """Stop the background thread; taking a window starts it again."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def _start(self, epoch: int, step: int) -> None:
        self.close()
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._draw(epoch)
        end = min((epoch + 1) * self._steps_per_epoch, self.total_steps)
        self._prefetcher = Prefetcher(self._window, step, end)

    def _draw(self, epoch: int) -> Sequence[Batch]:
        with randomness.seeded(self._device, self._settings.seed, epoch):
            return self._make(epoch)

    def _window(self, step: int) -> BatchWindow[Batch]:
        epoch, index = divmod(step, self._steps_per_epoch)
        width, batches = self.width, self._batches
        chosen = range(index * width, min((index + 1) * width, len(batches)))
        ends = index + 1 == self._steps_per_epoch
        position = epoch + (index + 1) / self._steps_per_epoch
        return BatchWindow(own_batches(batches, chosen, self._part), position, ends)


def own_batches(batches: Sequence[Batch], chosen: range, part: Part) -> tuple[Batch | Filler[Batch], ...]:
    """This process's of the batches of a step or a validation, and fillers up to as many as any process has.

    Taken by index: a sequence that makes its batches on demand need not know slices.
    """
    own: list[Batch | Filler[Batch]] = [batches[i] for i in chosen[part.index :: part.count]]
    missing = ceil_div(len(chosen), part.count) - len(own)
    last = own[-1] if own else batches[chosen[0]] if missing else None
    return (*own, *(Filler(cast(Batch, last)) for _ in range(missing)))

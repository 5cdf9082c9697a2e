"""The batches of each optimiser step of `fit`: an epoch's come from the caller, their windows from the background."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

import torch

from tunesmith.errors import DataError
from tunesmith.recipe.schema import TrainSection
from tunesmith.train import randomness
from tunesmith.train.order import auto_epochs
from tunesmith.train.prefetch import Prefetcher
from tunesmith.train.update import Batch
from tunesmith.units import ceil_div


@dataclass(frozen=True)
class BatchWindow(Generic[Batch]):
    """The batches of one step, and where in the run it is, in epochs."""

    batches: tuple[Batch, ...]
    epoch_position: float
    ends_epoch: bool


class BatchWindows(Generic[Batch]):
    """The windows of every step.

    `batches` is called in the thread that takes windows, with every global generator seeded for its epoch and put
    back afterwards: what it draws depends on seed and epoch alone, so that a resumed run draws the same.
    """

    def __init__(self, batches: Callable[[int], Sequence[Batch]], settings: TrainSection, device: torch.device) -> None:
        self._make, self._settings, self._device = batches, settings, device
        self._epoch, self._batches = 0, self._draw(0)
        if len(self._batches) == 0:
            raise DataError("there is no batch to train on: `batches` is empty")
        self._steps_per_epoch = ceil_div(len(self._batches), settings.accumulation)
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
        width, batches = self._settings.accumulation, self._batches
        # Sliced by index: a sequence that makes its batches on demand need not know slices.
        chosen = range(index * width, min((index + 1) * width, len(batches)))
        ends = index + 1 == self._steps_per_epoch
        position = epoch + (index + 1) / self._steps_per_epoch
        return BatchWindow(tuple(batches[i] for i in chosen), position, ends)

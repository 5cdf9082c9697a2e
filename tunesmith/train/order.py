"""Which documents a step trains on: a pure function of the seed and the step."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import DataError
from tunesmith.recipe.schema import DataSection, TrainSection
from tunesmith.text.packing import plan_epoch
from tunesmith.units import ceil_div

EPOCHS, MOST_EPOCHS, LEAST_STEPS = 3.0, 60.0, 60


def auto_epochs(train: TrainSection, steps_per_epoch: int) -> float:
    """The recipe's epochs, else 3, or as many as give 60 steps (at most 60): little data needs repeating."""
    if train.epochs is not None:
        return train.epochs
    return min(max(EPOCHS, float(ceil_div(LEAST_STEPS, steps_per_epoch))), MOST_EPOCHS)


@dataclass(frozen=True)
class Window:
    """The packs of one step, as document indices. The last window of an epoch may have fewer packs."""

    step: int
    epoch: int
    packs: tuple[tuple[int, ...], ...]
    epoch_position: float
    ends_epoch: bool


class DataOrder:
    """Steps to packs. Every epoch is planned anew from (seed, epoch); windows never cross its end."""

    def __init__(
        self,
        lengths: NDArray[np.int64],
        data: DataSection,
        train: TrainSection,
        micro_batch_tokens: int,
        width: int | None = None,
    ) -> None:
        """width: packs of a step, of all processes together; None: `train.accumulation`."""
        if len(lengths) == 0:
            raise DataError("the training data has no document: see data.train")
        self._lengths = lengths
        self._data = data
        self._train = train
        self._tokens = micro_batch_tokens
        self._width = width or train.accumulation
        self._plan: tuple[int, list[tuple[int, ...]]] | None = None
        self._last_steps: list[int] = []  # the steps up to each epoch's end
        self.total_steps = train.max_steps or self._count_steps(self.epochs)

    @property
    def epochs(self) -> float:
        """Passes over the data."""
        return auto_epochs(self._train, ceil_div(len(self._epoch(0)), self._width))

    def window(self, step: int) -> Window:
        """The packs of step number `step`, counted from 0."""
        while not self._last_steps or self._last_steps[-1] <= step:
            self._add_epoch(len(self._last_steps), 1.0)
        epoch = bisect_right(self._last_steps, step)
        first = self._last_steps[epoch - 1] if epoch else 0
        plan, width = self._epoch(epoch), self._width
        start = (step - first) * width
        packs = tuple(plan[start : start + width])
        done = start + len(packs)
        ends = step + 1 == self._last_steps[epoch] or step + 1 == self.total_steps
        return Window(step, epoch, packs, epoch + done / len(plan), ends)

    def _count_steps(self, epochs: float) -> int:
        for epoch in range(math.ceil(epochs)):
            self._add_epoch(epoch, min(1.0, epochs - epoch))
        return self._last_steps[-1]

    def _add_epoch(self, epoch: int, share: float) -> None:
        packs = math.ceil(len(self._epoch(epoch)) * share)
        before = self._last_steps[-1] if self._last_steps else 0
        self._last_steps.append(before + ceil_div(packs, self._width))

    def _epoch(self, epoch: int) -> list[tuple[int, ...]]:
        if self._plan is None or self._plan[0] != epoch:
            plan = plan_epoch(
                self._lengths,
                self._tokens,
                seed=self._train.seed,
                epoch=epoch,
                packing=self._data.packing,
                max_length=self._data.max_length,
            )
            self._plan = (epoch, plan)
        return self._plan[1]

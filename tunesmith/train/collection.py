"""Python's garbage collector, kept from stopping the host in the middle of a step."""

from __future__ import annotations

import gc
from types import TracebackType

from tunesmith.watch.frozen_objects import somebody_froze

# Optimiser steps between collections: cycles that hold tensors must not pile up, and a collection takes milliseconds.
COLLECT_EVERY_STEPS = 50


class CollectedBetweenSteps:
    """While this context is open the collector runs every `every_steps` steps, where `step_queued` is called, only.

    What exists at its beginning (the model, the data, every module) is frozen: it is not looked through again.
    At its end all is as it was; a collector that the caller had switched off, or objects that it had frozen, are
    left alone.
    """

    def __init__(self, every_steps: int = COLLECT_EVERY_STEPS) -> None:
        self._every_steps = every_steps
        self._steps = 0
        self._was_on = False
        self._froze = False

    def __enter__(self) -> CollectedBetweenSteps:
        self._was_on, self._froze = gc.isenabled(), not somebody_froze()
        gc.collect()
        if self._froze:
            gc.freeze()
        gc.disable()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._froze:
            gc.unfreeze()
        if self._was_on:
            gc.enable()

    def step_queued(self) -> None:
        """A step was queued, and on a GPU the device is at it: the time to collect costs nothing now."""
        self._steps += 1
        if self._steps % self._every_steps == 0:
            gc.collect()

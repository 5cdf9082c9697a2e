"""Python's garbage collector while requests run: what was there before is not looked through again.

A full collection goes through every object of the process: with torch and a model loaded that is 100 ms, in which a
device that was given one step ahead stands still for most of the time.
"""

from __future__ import annotations

import gc

from tunesmith.watch.frozen_objects import somebody_froze


class FrozenWhileBusy:
    """Objects that exist when work begins are frozen until it has ended; none where somebody froze some already."""

    def __init__(self) -> None:
        self._froze = False

    def begin(self) -> None:
        """There is work from now on."""
        if not self._froze and gc.isenabled() and not somebody_froze():
            gc.freeze()
            self._froze = True

    def end(self) -> None:
        """There is no work any more."""
        if self._froze:
            gc.unfreeze()
            self._froze = False

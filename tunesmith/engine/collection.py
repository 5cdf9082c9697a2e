"""Python's garbage collector while requests run: what was there before is not looked through again.

A full collection goes through every object of the process: with torch and a model loaded that is 100 ms, in which a
device that was given one step ahead stands still for most of the time.
"""

from __future__ import annotations

import gc

OF_THE_INTERPRETER = 1000
"""Fewer frozen objects than this nobody froze: Python 3.12 begins with some hundred of its own."""


class FrozenWhileBusy:
    """Objects that exist when work begins are frozen until it has ended; none where somebody froze some already."""

    def __init__(self) -> None:
        self._froze = False

    def begin(self) -> None:
        """There is work from now on."""
        if not self._froze and gc.isenabled() and gc.get_freeze_count() < OF_THE_INTERPRETER:
            gc.freeze()
            self._froze = True

    def end(self) -> None:
        """There is no work any more."""
        if self._froze:
            gc.unfreeze()
            self._froze = False

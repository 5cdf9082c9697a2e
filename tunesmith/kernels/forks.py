"""Numbered pieces of work by forks of this program; one that dies takes only its own piece with it.

A pool of Python's waits for ever for a process that was killed, and ends its processes by a signal that they may
ignore: a program that ignores it (the engine of `tunesmith serve`) hands that on to those that it starts.

    numbers 0 1 2 ... --pipe--> forks, each the next when it is free --pipe--> those that are done
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import struct
import warnings
from collections.abc import Callable
from typing import Any

_NUMBER = struct.Struct("=H")
MOST = 2048
"""Pieces: their numbers lie in the pipe before anybody reads it, of which a page is there for certain."""


def done_in_forks(work: Callable[[int], bool], count: int, processes: int) -> set[int]:
    """The numbers below `count` for which work gave True in so many forks. Call it where nothing else runs.

    A fork's work that raises, or ends its process, is not done. Of more than `MOST` numbers the rest are not done.
    """
    numbers, ahead = os.pipe()
    done, tell = os.pipe()
    os.write(ahead, b"".join(_NUMBER.pack(number) for number in range(min(count, MOST))))
    os.close(ahead)  # whoever finds the pipe empty is at its end
    forks = _started(processes, work, numbers, tell)
    os.close(numbers)
    os.close(tell)  # the last fork's end is the pipe's
    with os.fdopen(done, "rb") as told:
        found = {number for (number,) in _NUMBER.iter_unpack(told.read())}
    for fork in forks:
        fork.join()
    return found


def _started(processes: int, *arguments: Any) -> list[Any]:
    """As many as the machine gives, if not all."""
    forks: list[Any] = []
    with warnings.catch_warnings(), contextlib.suppress(OSError):
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork.*")
        for _ in range(processes):
            fork = multiprocessing.get_context("fork").Process(target=_work, args=arguments)
            fork.start()
            forks.append(fork)
    return forks


def _work(work: Callable[[int], bool], numbers: int, tell: int) -> None:
    while number := os.read(numbers, _NUMBER.size):
        if work(*_NUMBER.unpack(number)):
            os.write(tell, number)

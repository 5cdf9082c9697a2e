"""How steps are timed: each from an idle device to an idle one, or queued one after the other as training queues them.

On a GPU all runners' timed steps are continuous. The device is waited for before the first and after the last. An event
in its stream marks the end of each step, and no one waits for it; losses and gradient norms stay on the device until
all steps are done. On a CPU the host does the work itself: there a step is timed by its clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Protocol, Self

import torch
from torch import Tensor

IDLE_TO_IDLE = "each step from idle to idle"
CONTINUOUS = "continuous"


def timing_of(device: torch.device) -> str:
    """How a device's timed steps are timed, by every runner."""
    return CONTINUOUS if device.type == "cuda" else IDLE_TO_IDLE


class Mark(Protocol):
    """A moment in a device's stream, as `torch.cuda.Event` is one."""

    def elapsed_time(self, end: Self, /) -> float:
        """Milliseconds from this moment to `end`."""


def mark_of(device: torch.device) -> Callable[[], Mark]:
    """What puts a mark where the device's stream ends now."""

    def mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    return mark


class QueuedSteps:
    """Steps that are queued and not waited for. The first lasts from the making of this object, on an idle device."""

    def __init__(self, mark: Callable[[], Mark]) -> None:
        self._mark = mark
        self._marks = [mark()]
        self._numbers: list[tuple[Any, Any]] = []

    def end(self, loss: Tensor | float, grad_norm: Tensor | float) -> None:
        """All of a step is queued; its numbers stay where they are."""
        self._marks.append(self._mark())
        self._numbers.append((_kept(loss), _kept(grad_norm)))

    def read(self) -> Iterator[tuple[float, float, float]]:
        """Seconds, loss and gradient norm of every step; the device must have done them all."""
        for (since, until), (loss, norm) in zip(pairwise(self._marks), self._numbers, strict=True):
            yield since.elapsed_time(until) / 1000, float(loss), float(norm)


def _kept(number: Tensor | float) -> Tensor | float:
    """The number where later steps write nothing over it; queued after the mark, so the next step pays for it."""
    return number.detach().clone() if isinstance(number, Tensor) else number

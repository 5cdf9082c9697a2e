"""How long steps take, by the device's own clock where it runs behind the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step. data_wait_s: the part in which the device had nothing to do for want of data."""

    duration_s: float
    data_wait_s: float


class StepClock:
    """Times steps that are queued faster than they run.

    On a GPU a step lasts from the end of the step before to its own end, both marked by events in the stream, so
    that durations add up to the time that passed. After an interruption (a validation, a checkpoint) it lasts from its
    own beginning. Elsewhere it is the host's time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._last_end: torch.cuda.Event | None = None
        self._began = self._mark()
        self._data_ready, self._host_wait_s = self._began, 0.0

    def start(self) -> None:
        """The step begins: its data is asked for now."""
        self._began = self._mark()

    def data_ready(self, host_wait_s: float) -> None:
        """The data is there; the host waited `host_wait_s` seconds for it."""
        self._data_ready, self._host_wait_s = self._mark(), host_wait_s

    def stop(self) -> Callable[[], StepTime]:
        """All of the step is queued. Returns what reads its time; it waits for the step's end."""
        began, ready, waited, end = self._began, self._data_ready, self._host_wait_s, self._mark()
        if not isinstance(end, torch.cuda.Event):
            duration_s = _seconds(began, end)
            return lambda: StepTime(duration_s, waited)
        since = self._last_end or began
        self._last_end = end

        def read() -> StepTime:
            end.synchronize()
            # The device was busy with the step before for a part of the host's wait: that part cost nothing.
            return StepTime(_seconds(since, end), max(0.0, min(waited, _seconds(since, ready))))

        return read

    def interrupt(self) -> None:
        """Something that is no step comes now: its time is not the next step's."""
        self._last_end = None

    def _mark(self) -> torch.cuda.Event | float:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _seconds(since: torch.cuda.Event | float, until: torch.cuda.Event | float) -> float:
    if isinstance(since, torch.cuda.Event) and isinstance(until, torch.cuda.Event):
        return float(since.elapsed_time(until)) / 1000
    assert isinstance(since, float)
    assert isinstance(until, float)
    return until - since

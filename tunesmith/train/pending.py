"""What was asked of the device and is not read yet: the host goes on while the device works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class Pending(Generic[Result]):
    """A result that the device may still be at. is_ready: `read` does not wait for the device."""

    def __init__(self, read: Callable[[], Result], *, is_ready: bool) -> None:
        self.read = read
        self.is_ready = is_ready


class HostCopy:
    """Numbers of the device on their way to the host; the host waits for them only where it reads them."""

    def __init__(self, numbers: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        self._numbers = numbers
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            # Blocking: a host that waits leaves its core to the thread that makes batches.
            self._done = torch.cuda.Event(blocking=True)
            self._done.record(torch.cuda.current_stream(numbers.device))

    def read(self) -> list[float]:
        """The numbers, waited for."""
        if self._done is not None:
            self._done.synchronize()
        values: list[float] = self._numbers.tolist()
        return values


def reads_late(device: torch.device) -> bool:
    """Whether a step's numbers are read while the next step runs: where reading them at once would idle the device."""
    return device.type == "cuda"

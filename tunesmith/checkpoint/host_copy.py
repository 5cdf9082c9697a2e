"""Copies of what a process writes, in host memory that is used again: training goes on while the copy is written.

On a GPU the copies run on a stream of their own, into pinned memory, beside the next step's work. The one thing that
must not overtake them is the optimiser's update, which writes what they read: `Copied.fence` has the device wait.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from tunesmith.checkpoint.shards import Plan, PlannedFile, Shard
from tunesmith.errors import DeviceError
from tunesmith.model.transfer import pinned_memory
from tunesmith.units import MIB

CHUNK_BYTES = 256 * MIB
"""Copies and what is written are cut at these: memory is taken, and given back, in such pieces."""
WRITE_BYTES = 4 * MIB
Pairs = Iterable[tuple[Tensor, Tensor]]
"""(bytes on the host, the tensor that they are to hold)."""
_log = logging.getLogger(__name__)


class Copied(Protocol):
    """Copies that were begun."""

    def wait(self) -> None:
        """Wait, on the host, until they are done."""

    def fence(self) -> None:
        """What the device is given from now on runs after them. The host does not wait."""

    def fence_s(self) -> float | None:
        """How long the device waited at the fence; None where that is not known yet."""


class Lane(Protocol):
    """How copies get from a device to the host."""

    def buffer(self, num_bytes: int) -> Tensor:
        """Host memory to copy to."""

    def copy(self, pairs: Pairs) -> Copied:
        """Begin to copy what the tensors are after the work that the device has been given so far."""


class HostLane:
    """Tensors on the host: the copy is done when it was begun."""

    def buffer(self, num_bytes: int) -> Tensor:
        """Plain memory, every page of it taken now: not while the first copy is waited for."""
        return torch.empty(num_bytes, dtype=torch.uint8).fill_(0)

    def copy(self, pairs: Pairs) -> Copied:
        """Copy now."""
        for target, source in pairs:
            target.copy_(source)
        return _Done()


class _Done:
    def wait(self) -> None:
        return

    def fence(self) -> None:
        return

    def fence_s(self) -> float | None:
        return 0.0


class CudaLane:
    """A GPU's tensors: a stream of its own, and pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def buffer(self, num_bytes: int) -> Tensor:
        """Pinned memory; plain where there is none to be had, into which copies stop the host."""
        try:
            with torch.cuda.device(self._device):
                return pinned_memory(num_bytes, "training stops while checkpoints are copied")
        except DeviceError as error:
            _log.warning("%s", error)
            return torch.empty(num_bytes, dtype=torch.uint8)

    def copy(self, pairs: Pairs) -> Copied:
        """Queue the copies behind what the current stream has been given."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(cast(Any, self._stream)):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return _CudaCopied(self._device, self._stream.record_event())


class _CudaCopied:
    """The event after the copies, and the two around what waits for it."""

    def __init__(self, device: torch.device, event: Any) -> None:
        self._device, self._event = device, event
        self._around: tuple[Any, Any] | None = None

    def wait(self) -> None:
        self._event.synchronize()

    def fence(self) -> None:
        if self._around is not None or self._event.query():
            return
        stream = torch.cuda.current_stream(self._device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        stream.wait_event(self._event)
        after.record(stream)
        self._around = (before, after)

    def fence_s(self) -> float | None:
        if self._around is None:
            return 0.0 if self._event.query() else None
        before, after = self._around
        return before.elapsed_time(after) / 1000 if after.query() else None


def lane_for(device: torch.device) -> Lane:
    """How copies leave this device."""
    return CudaLane(device) if device.type == "cuda" else HostLane()


class HostImage:
    """The bytes of what a process writes, file after file, cut into chunks of one size."""

    def __init__(self, plan: Plan, rank: int, lane: Lane, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._plan, self._rank, self._chunk_bytes = plan, rank, chunk_bytes
        self._spans: dict[str, tuple[int, int]] = {}
        position = 0
        for file in plan.files_of(rank):
            size = sum(plan.boxes[rank][number].num_bytes for number, _ in file.entries)
            self._spans[file.name] = (position, position + size)
            position += size
        self.num_bytes = position
        sizes = (min(chunk_bytes, position - start) for start in range(0, position, chunk_bytes))
        self._chunks = [lane.buffer(size) for size in sizes]

    def pairs(self, shards: Sequence[Shard]) -> Iterator[tuple[Tensor, Tensor]]:
        """What has to be copied where."""
        position = 0
        for file in self._plan.files_of(self._rank):
            for number, _ in file.entries:
                source = shards[number].tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                yield from self._parts(position, source)
                position += source.numel()

    def source(self, file: PlannedFile) -> Iterator[memoryview]:
        """The bytes of one file, once they are there."""
        start, stop = self._spans[file.name]
        for chunk, first, last in self._ranges(start, stop):
            view = memoryview(cast(Any, chunk.numpy()))
            for begin in range(first, last, WRITE_BYTES):
                yield view[begin : min(last, begin + WRITE_BYTES)]

    def _parts(self, position: int, source: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        done = 0
        for chunk, first, last in self._ranges(position, position + source.numel()):
            yield chunk[first:last], source[done : done + last - first]
            done += last - first

    def _ranges(self, start: int, stop: int) -> Iterator[tuple[Tensor, int, int]]:
        """The chunks that bytes of the image lie in, and where there."""
        while start < stop:
            number, first = divmod(start, self._chunk_bytes)
            last = min(self._chunk_bytes, first + stop - start)
            yield self._chunks[number], first, last
            start += last - first

"""Training states saved beside training: the loop waits for a copy to the host, a thread writes it.

    saver = AsyncSaver(run.checkpoints, keep=2, device=device, agreement=checkpoint_group())
    saver.save(step, shards, facts)     all processes, after a step; returns when the copies are queued
    saver.fence()                       before whatever next writes to those tensors: the optimiser's update
    saver.poll()                        at every step: what became of a save
    saver.close()                       waits

One save is in flight at most: a second waits for the first, with a warning. It is not left out, for a checkpoint that
was asked for is worth more than seconds, and whether to wait is then known to every process without asking the others.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from tunesmith.checkpoint.agreement import Agreement
from tunesmith.checkpoint.host_copy import Copied, HostImage, Lane, lane_for
from tunesmith.checkpoint.sharded import ShardedWriter, Source, Ticket, tensors_source
from tunesmith.checkpoint.shards import FILE_BYTES, PlannedFile, Shard
from tunesmith.checkpoint.tensor_files import Bytes
from tunesmith.hardware import available_memory_bytes
from tunesmith.units import format_bytes, format_seconds

LONG_WAIT_S = 0.1
MEMORY_SHARE = 0.8
"""Of the free memory of a machine, what copies may take."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A state that was written.

    num_bytes: by this process. stall_s: how long `save` kept the loop. device_stall_s: how long the device waited at
    the fence, None where that is not known. duration_s: from `save` until the state had its name.
    """

    path: Path
    step: int
    num_bytes: int
    stall_s: float
    device_stall_s: float | None
    duration_s: float


class AsyncSaver:
    """Saves the states of one run in the background. Every process has one, and all of them save the same steps.

    Memory: pinned buffers for what this process writes, made at the first save (or by `prepare`) and kept. Where a
    machine has not so much, it says so, and training waits for the disk.
    """

    def __init__(
        self,
        checkpoints: Path,
        *,
        keep: int,
        device: torch.device | str = "cpu",
        agreement: Agreement | None = None,
        lane: Lane | None = None,
        file_bytes: int | None = FILE_BYTES,
        on_warning: Callable[[str], None] = _log.warning,
    ) -> None:
        self._writer = ShardedWriter(checkpoints, keep=keep, agreement=agreement, file_bytes=file_bytes)
        self._lane = lane or lane_for(torch.device(device))
        self._on_warning = on_warning
        self._image: HostImage | None = None
        self._image_number = 0
        self._copied: Copied | None = None
        self._thread: threading.Thread | None = None
        self._outcomes: deque[tuple[int, Saved | Exception]] = deque()
        self._step = 0
        self.stall_s = 0.0
        """How long the last `save` kept the loop."""
        self.failed_step: int | None = None
        """The step of the save whose error was raised last."""

    def prepare(self, shards: Sequence[Shard]) -> None:
        """Agree on the plan and take the buffers in the background, so that the first save need not. All call it.

        Raises: CheckpointError for shards that don't fit together.
        """
        self._join()
        ticket = self._writer.begin(0, shards)
        if self._fits(ticket):
            self._start(self._take_buffers, ticket)

    def save(self, step: int, shards: Sequence[Shard], facts: Mapping[str, Any]) -> float:
        """Begin to save; returns the seconds that the loop was kept. All processes call it, after the same step.

        The shards' tensors may be written to again after `fence`; on a CPU, at once. What goes wrong later is raised
        by `poll`, `wait` or `close`. Raises: CheckpointError, in all processes, for shards that don't fit together.
        """
        began = time.perf_counter()
        self._wait_for_earlier(step)
        ticket = self._writer.begin(step, shards)
        job = _Job(ticket, tensors_source(shards), list(shards), copy.deepcopy(dict(facts)), began)
        self._step = step
        if not self._fits(ticket):
            return self._save_now(job)
        try:
            image = self._make_image(ticket)
            job.source = image.source
            self._copied = job.copied = self._lane.copy(image.pairs(shards))
        except Exception as error:  # the other processes have begun, and are told of it as of any other
            job.source = _raising(error)
        self.stall_s = job.stall_s = time.perf_counter() - began
        self._start(self._write, job)
        return self.stall_s

    def fence(self) -> None:
        """Call before anything writes to the tensors of a save: the device waits for the copies, the host does not."""
        if self._copied is not None:
            self._copied.fence()

    def poll(self) -> Saved | None:
        """What became of a save that has ended, once; None where there is no news.

        Raises: what went wrong, as a save that waits does (OSError for a full disk); `failed_step` says of which step.
        """
        if self._thread is not None and not self._thread.is_alive():
            self._join()
        if not self._outcomes:
            return None
        step, outcome = self._outcomes.popleft()
        if isinstance(outcome, Saved):
            return outcome
        self.failed_step = step
        raise outcome

    def wait(self) -> Saved | None:
        """Wait for the save in flight, then as `poll`."""
        self._join()
        return self.poll()

    def close(self) -> None:
        """Wait for the save in flight and let the buffers go. Raises: as `poll`."""
        self._join()
        self._image = self._copied = None
        while self.poll() is not None:
            pass

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.close()
        except Exception as late:
            if error is None:
                raise
            self._on_warning(f"the checkpoint of step {self.failed_step} was not written: {late}")

    def _wait_for_earlier(self, step: int) -> None:
        began = time.perf_counter()
        self._join()
        waited_s = time.perf_counter() - began
        if waited_s > LONG_WAIT_S:
            self._on_warning(
                f"step {step} waited {format_seconds(waited_s)} until the checkpoint of step {self._step} was written: "
                f"save less often (checkpoint.every_steps), or to a faster disk"
            )

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _start(self, target: Callable[..., Any], *arguments: Any) -> None:
        self._thread = threading.Thread(target=target, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def _make_image(self, ticket: Ticket) -> HostImage:
        if self._image is None or self._image_number != ticket.number:
            self._image = HostImage(ticket.plan, self._writer.agreement.rank, self._lane)
            self._image_number = ticket.number
        return self._image

    def _fits(self, ticket: Ticket) -> bool:
        """Whether the copies of all processes of this machine fit into its memory."""
        if self._image is not None and self._image_number == ticket.number:
            return True
        self._image = None  # the buffers of another plan go first
        needed = sum(ticket.plan.num_bytes(rank) for rank in ticket.neighbours)
        return needed <= MEMORY_SHARE * available_memory_bytes()

    def _save_now(self, job: _Job) -> float:
        needed = format_bytes(sum(job.ticket.plan.num_bytes(rank) for rank in job.ticket.neighbours))
        self._on_warning(
            f"the checkpoint of step {job.ticket.step} is written while training waits: this machine has not the "
            f"{needed} of free memory that a copy takes"
        )
        self._image = self._copied = None
        self._write(job)
        self.stall_s = time.perf_counter() - job.began
        return self.stall_s

    def _take_buffers(self, ticket: Ticket) -> None:
        with contextlib.suppress(RuntimeError, MemoryError, OSError):  # `save` tries again, and says so
            self._make_image(ticket)

    def _write(self, job: _Job) -> None:
        """In the thread."""
        try:
            if job.copied is not None:
                job.copied.wait()
                job.shards.clear()
            path = self._writer.finish(job.ticket, job.source, job.facts)
            self._outcomes.append((job.ticket.step, self._saved(job, path)))
        except Exception as error:
            self._outcomes.append((job.ticket.step, error))

    def _saved(self, job: _Job, path: Path) -> Saved:
        duration_s = time.perf_counter() - job.began
        stall_s = duration_s if job.stall_s is None else job.stall_s
        device_s = 0.0 if job.copied is None else job.copied.fence_s()
        num_bytes = job.ticket.plan.num_bytes(self._writer.agreement.rank)
        return Saved(path, job.ticket.step, num_bytes, stall_s, device_s, duration_s)


@dataclass
class _Job:
    """A save in flight. shards: held until they are copied, for nothing else may hold a tensor.

    copied: None where the tensors are read as they are written, and stall_s with it: training waits until the end.
    """

    ticket: Ticket
    source: Source
    shards: list[Shard]
    facts: Mapping[str, Any]
    began: float
    copied: Copied | None = None
    stall_s: float | None = None


def _raising(error: Exception) -> Source:
    """A source that can't be read."""

    def source(_: PlannedFile) -> Iterable[Bytes]:
        raise error

    return source

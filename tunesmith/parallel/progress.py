"""How far a process has come, as others can compare it: what its watchdog thread reads while the process works."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any
from zlib import crc32

_FRAMES = 40
_WAITING_FOLDERS = ("/torch/distributed/", "/tunesmith/parallel/")


@dataclass(frozen=True)
class Report:
    """What a rank says of itself.

    beat: grows with every report. moved: grows with all that is progress. collectives: by group, how many collectives
    this rank has entered. at: where in the run it is, in words. patient: in something that may take long (a first step,
    a save, tokenising). waits: its main thread is inside torch.distributed. finished: it needs nobody any more.
    """

    beat: int
    moved: int
    step: int
    collectives: dict[str, int]
    at: str
    patient: bool
    waits: bool
    finished: bool = False

    def as_data(self) -> dict[str, Any]:
        """Plain data that `Report(**data)` reads back."""
        return asdict(self)

    def is_as_far_as(self, other: Report) -> bool:
        """Whether nothing has moved between the two reports of one rank."""
        return (self.moved, self.collectives) == (other.moved, other.collectives)


@dataclass
class Progress:
    """Advanced by the main thread (a few additions a step), read by the watchdog's.

    uneven: names of groups whose members rightly enter different numbers of operations (a pipeline's sends).
    """

    moved: int = 0
    steps: int = 0
    at: str = "starting"
    patience: int = 1
    finished: bool = False
    uneven: frozenset[str] = frozenset()
    thread: int = field(default_factory=threading.get_ident)
    _beat: int = 0

    def leave_out(self, *groups: Any) -> None:
        """Don't compare the calls in these groups: a pipeline's, or those of a thread beside the main one."""
        self.uneven |= {group.group_name for group in groups}

    def move(self, at: str | None = None) -> None:
        """Something was done: a micro-batch, a batch of validation. `at`: where the run is now."""
        self.moved += 1
        if at is not None:
            self.at = at

    def step_done(self, number: int) -> None:
        """A step is behind. After the first every rank is expected to keep up: what is compiled is compiled."""
        if self.steps == 0:
            self.patience -= 1
        self.steps += 1
        self.move(f"step {number + 1}")

    @contextmanager
    def long(self, what: str) -> Iterator[None]:
        """While what is inside may take long on one rank alone: a save, an export, compilation, tokenising."""
        before, self.at = self.at, what
        self.patience += 1
        try:
            yield
        finally:
            self.patience -= 1
            self.at = before
            self.move()

    def report(self) -> Report:
        """This moment's report; called by the watchdog's thread only."""
        self._beat += 1
        waits = is_waiting(sys._current_frames().get(self.thread))
        counts = collectives_entered(self.uneven)
        patient = self.patience > 0
        return Report(self._beat, self.moved, self.steps, counts, self.at, patient, waits, self.finished)


def collectives_entered(uneven: frozenset[str] = frozenset()) -> dict[str, int]:
    """By group (its name and members) how many collectives this rank has entered; torch counts them itself.

    gloo's groups count sends and receives too. Args: uneven: groups that are left out.
    """
    import torch.distributed as dist

    counts: dict[str, int] = {}
    if not dist.is_initialized():
        return counts
    world = dist.distributed_c10d._world
    for group, name in list(world.pg_names.items()):
        if name in uneven:
            continue
        members = dist.get_process_group_ranks(group)
        place = f"{name}/{crc32(repr(members).encode()):x}"
        for device in group._device_types:
            try:
                backend: Any = group._get_backend(device)
                counts[f"{place}/{device.type}"] = backend._get_sequence_number_for_group()
            except (RuntimeError, AttributeError):  # a backend that does not count
                continue
    return counts


def is_waiting(frame: FrameType | None) -> bool:
    """Whether a thread's innermost Python code is torch.distributed's, or what calls it here."""
    return frame is not None and any(folder in frame.f_code.co_filename for folder in _WAITING_FOLDERS)


def stack_of(thread: int) -> tuple[str, str]:
    """Where a thread of this process is: in a line (the innermost place), and the whole stack as text."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "nowhere: its main thread has ended", ""
    summary = traceback.extract_stack(frame, limit=None)[-_FRAMES:]
    last = summary[-1]
    return f"{last.filename}:{last.lineno} in {last.name}", "".join(traceback.format_list(summary))

"""Recorded decoding in several processes: the first says what is recorded and replayed, the others do the same.

A recorded step has the team's sums in it, so all must record, and replay, the same steps in the same order. Whether all
can is agreed upon twice: before anything is launched (memory may be short in one), and after the recording.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tunesmith.engine.batch import StepBatch
from tunesmith.engine.graphs import Decoded, DecodeGraphs, Kind
from tunesmith.engine.recorder import Made, Recorder
from tunesmith.engine.tensor_messages import Message
from tunesmith.errors import ParallelError, TunesmithError
from tunesmith.parallel.collectives import Team


class WarmUpError(TunesmithError):
    """A step that was to be recorded broke off while the other processes were in the middle of it.

    No RuntimeError: a recording that merely fails is done without, this ends the processes.
    """


class SharedGraphs(DecodeGraphs):
    """The graphs of one of several processes: all have the same ones."""

    def __init__(self, *arguments: Any, team: Team, device: torch.device, **options: Any) -> None:
        super().__init__(*arguments, device=device, **options)
        self.team = team
        self.device = device
        self.recorder = Together(self.recorder)

    def _record(self, kind: Kind, size: int) -> bool:
        if not self._in_all(self._has_room(kind)):
            self.refused.setdefault(kind, "memory is short in another process, so no more graphs are recorded")
            return False
        if self._in_all(self._add(kind, size)):
            return True
        self._graphs.get(kind, {}).pop(size, None)
        self.refused.setdefault(kind, "another process could not record it")
        return False

    def _in_all(self, holds: bool) -> bool:
        """Whether it holds in every process; all call it."""
        told = torch.tensor([int(holds)], device=self.device)
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MIN, group=self.team.group)
        return bool(told.item())


class LeadingGraphs(SharedGraphs):
    """The first process's graphs. tell: gives a message to the others."""

    def __init__(self, *arguments: Any, tell: Callable[[Message], None], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.tell = tell
        self._may_record = False

    def prepare(self, batch: StepBatch) -> int:
        """Rows of the graph that the next call replays for this batch; 0 for none. May record one before."""
        if not batch.is_decode or batch.score_rows is not None:
            return 0
        self._may_record = True
        try:
            graph = self._graph(batch)
        finally:
            self._may_record = False
        return 0 if graph is None else graph.num_rows

    def _want(self, kind: Kind, size: int) -> None:
        """Only where the others have not been told of the pass yet."""
        if self._may_record:
            super()._want(kind, size)

    def _record(self, kind: Kind, size: int) -> bool:
        self.tell({"kind": "record", "context": kind.max_context, "adapters": kind.has_adapters, "size": size})
        return super()._record(kind, size)


class FollowingGraphs(SharedGraphs):
    """Another process's graphs."""

    def _want(self, kind: Kind, size: int) -> None:
        """What is recorded is said by the first process."""

    def follow_recording(self, message: Message) -> None:
        """Record what the first process records now."""
        self._record(Kind(message["context"], message["adapters"]), message["size"])

    def follow(self, batch: StepBatch, rows: int) -> Decoded:
        """Replay what the first process replays now. Raises: ParallelError where it was not recorded here."""
        graph = self._graph(batch)
        if graph is None or graph.num_rows != rows:
            reasons = "; ".join(self.refused.values()) or "no reason is known"
            raise ParallelError(
                f"a step of {rows} rows is recorded in the first process and not in this one ({reasons}): set "
                f"enforce_eager"
            )
        decoded = self(batch)
        assert decoded is not None
        return decoded


class Together:
    """A recorder whose first run of the work is a pass of all processes."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def warm_up(self, work: Callable[[], object]) -> None:
        """Raises WarmUpError: whoever is in the middle of the same pass waits for this process."""
        try:
            self.recorder.warm_up(work)
        except RuntimeError as error:
            raise WarmUpError(
                f"a step that was to be recorded failed: {error}; set enforce_eager, or a lower gpu_memory_utilization"
            ) from error

    def record(self, work: Callable[[], Made]) -> tuple[Callable[[], None], Made]:
        """Nothing runs while it is recorded, so nobody waits."""
        return self.recorder.record(work)

    def borrow(self, tensor: Tensor) -> Tensor:
        """See `Recorder`."""
        return self.recorder.borrow(tensor)

    def free_bytes(self) -> int | None:
        """See `Recorder`."""
        return self.recorder.free_bytes()

    def renew(self) -> None:
        """See `Recorder`."""
        self.recorder.renew()

"""Recorded decoding in several processes: the first says what is recorded and replayed, the others do the same.

A recorded step has the team's sums in it, so all must record, and replay, the same steps in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tunesmith.engine.batch import StepBatch
from tunesmith.engine.graphs import SPARE_BYTES, Decoded, DecodeGraphs, Kind
from tunesmith.engine.tensor_messages import Message
from tunesmith.errors import ParallelError


class LeadingGraphs(DecodeGraphs):
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
        free = self.recorder.free_bytes()
        if free is None or free >= SPARE_BYTES:
            self.tell({"kind": "record", "context": kind.max_context, "adapters": kind.has_adapters, "size": size})
        return super()._record(kind, size)


class FollowingGraphs(DecodeGraphs):
    """Another process's graphs."""

    def _want(self, kind: Kind, size: int) -> None:
        """What is recorded is said by the first process."""

    def follow_recording(self, message: Message) -> None:
        """Record what the first process records now. Where that can't be, it can't be there either."""
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

"""Who runs next: a queue, and the requests that run together.

    submit -> queue -> admit (a lease on the cache) -> running -> finish or abort (the lease is closed)

`max_running` is 1 for now; the step of the engine already takes whatever is running.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from tunesmith.engine.request import Request
from tunesmith.engine.sampling import Sampler
from tunesmith.engine.text import AnswerText


class Lease(Protocol):
    """A running request's hold on the cache."""

    def close(self) -> None:
        """Give everything back; closing twice does nothing."""


@dataclass
class Sequence:
    """A request that runs: what it still has to compute (`pending`) and what it has said."""

    request: Request
    lease: Lease
    sampler: Sampler
    text: AnswerText
    started_s: float
    pending: list[int]
    token_ids: list[int] = field(default_factory=list)
    first_token_s: float = 0.0


class Scheduler:
    """First come, first served; a request that doesn't fit yet holds back those behind it."""

    def __init__(self, max_running: int = 1) -> None:
        self.max_running = max_running
        self.queue: deque[Request] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.queue or self.running)

    def submit(self, request: Request) -> None:
        """Put a request at the end of the queue."""
        self.queue.append(request)

    def admit(self, start: Callable[[Request], Sequence | None]) -> None:
        """Start waiting requests, in order, while there is a place and `start` finds room in the cache."""
        while self.queue and len(self.running) < self.max_running:
            sequence = start(self.queue[0])
            if sequence is None:
                return
            self.queue.popleft()
            self.running.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out and close its lease."""
        self.running.remove(sequence)
        sequence.lease.close()

    def withdraw(self, request_id: int) -> Request | None:
        """Take a waiting request out of the queue; None when it doesn't wait."""
        for request in self.queue:
            if request.id == request_id:
                self.queue.remove(request)
                return request
        return None

    def find(self, request_id: int) -> Sequence | None:
        """The running sequence of a request, or None."""
        return next((s for s in self.running if s.request.id == request_id), None)

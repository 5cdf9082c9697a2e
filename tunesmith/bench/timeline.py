"""Allocated bytes over the time of one step: after every operation, with the phases of the step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from tunesmith.bench.counting import held_tensors, watched_step
from tunesmith.train.session import Session
from tunesmith.watch.memory import LiveStorages

MAX_POINTS = 2000


class Timeline(LiveStorages):
    """Records (seconds, bytes) after every operation: live storages on a CPU, the allocator's count on a GPU."""

    def __init__(self, existing: Sequence[torch.Tensor], device: torch.device) -> None:
        super().__init__(existing, device_type=device.type)
        self.device = device
        self.points: list[tuple[float, int]] = []
        self.phases: list[tuple[float, str]] = []
        self._began = time.perf_counter()

    def mark(self, phase: str, *_: object) -> None:
        """A phase of the step begins now."""
        if not self.phases or self.phases[-1][1] != phase:
            self.phases.append((time.perf_counter() - self._began, phase))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation, then look."""
        if self.device.type == "cuda":
            result = func(*args, **dict(kwargs or {}))
            held = torch.cuda.memory_allocated(self.device)
        else:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            held = self.current_bytes
        self.points.append((time.perf_counter() - self._began, held))
        return result


def memory_timeline(session: Session) -> dict[str, Any]:
    """One more step on the session's last window, watched. It is slower than a step that is not."""
    timeline = Timeline(held_tensors(session), session.device)
    hooks = [
        session.module.register_forward_pre_hook(partial(timeline.mark, "forward")),
        session.module.register_forward_hook(partial(timeline.mark, "loss and backward")),
        session.optimizer.register_step_pre_hook(partial(timeline.mark, "optimiser")),
    ]
    try:
        watched_step(session, timeline, "the step that memory is watched in")
    finally:
        for hook in hooks:
            hook.remove()
    return {
        "source": "cuda" if session.device.type == "cuda" else "live storages",
        "points": thin(timeline.points, MAX_POINTS),
        "phases": timeline.phases,
        "peak_bytes": max((held for _, held in timeline.points), default=0),
    }


def thin(points: Sequence[tuple[float, int]], most: int) -> list[tuple[float, int]]:
    """About `most` points at most: the highest of every stretch, so that no peak is lost; the first and last stay."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) // (most - 2))
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    return [points[0], *(max(stretch, key=lambda point: point[1]) for stretch in stretches), points[-1]]

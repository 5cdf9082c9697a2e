"""Where a step's time goes, from a profiler's trace: computing, communication that nothing hides, neither.

Exposed communication is time in which kernels of communication run on the device and none else does. Turning
communication off and subtracting would not do: sharded weights must be gathered for a step to be a step at all, and
messages that overlap slow computing down, which a step without them does not show. A collective's kernel also runs
while it waits for a process that is late; that wait is the step's as much as the transfer is.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from tunesmith.bench.intervals import Interval, length, union, without
from tunesmith.bench.profile import CHATTER, without_lines

_ON_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_HOST_OPERATORS = ("aten::", "tunesmith::", "fsdp::")
_NCCL, _GLOO = "nccl", "gloo:"


@dataclass(frozen=True)
class Split:
    """Shares of the traced time, 0 to 1. communication_ratio: all of it, hidden or not. idle_ratio: nothing ran."""

    exposed_ratio: float
    communication_ratio: float
    idle_ratio: float
    traced_s: float


@dataclass(frozen=True)
class Timeline:
    """Stretches in which communication or computing ran, in microseconds."""

    communication: tuple[Interval, ...]
    computing: tuple[Interval, ...]

    def split(self) -> Split | None:
        """The shares; None where nothing was traced."""
        everything = union([*self.communication, *self.computing])
        if not everything:
            return None
        whole = everything[-1][1] - everything[0][0]
        return Split(
            exposed_ratio=length(without(self.communication, self.computing)) / whole,
            communication_ratio=length(self.communication) / whole,
            idle_ratio=1.0 - length(everything) / whole,
            traced_s=whole / 1e6,
        )


def device_timeline(events: Sequence[Mapping[str, Any]]) -> Timeline:
    """The kernels and copies of a GPU's trace: NCCL's kernels are communication, all else is computing."""
    found = [event for event in events if event.get("ph") == "X" and event.get("cat") in _ON_DEVICE]
    spoken = [_stretch(event) for event in found if _is_nccl(event)]
    return Timeline(tuple(spoken), tuple(_stretch(event) for event in found if not _is_nccl(event)))


def host_timeline(events: Sequence[Mapping[str, Any]]) -> Timeline:
    """The operators of a CPU's trace: gloo's own threads communicate, others compute.

    Time of the interpreter between two operators is neither.
    """
    found = [event for event in events if event.get("ph") == "X"]
    spoken = [event for event in found if str(event.get("name", "")).startswith(_GLOO)]
    threads = {event.get("tid") for event in spoken}
    computed = [
        event
        for event in found
        if event.get("cat") == "cpu_op"
        and event.get("tid") not in threads
        and str(event.get("name", "")).startswith(_HOST_OPERATORS)
    ]
    return Timeline(tuple(map(_stretch, spoken)), tuple(map(_stretch, computed)))


def _is_nccl(event: Mapping[str, Any]) -> bool:
    return str(event.get("name", "")).lower().startswith(_NCCL)


def _stretch(event: Mapping[str, Any]) -> Interval:
    start = float(event["ts"])
    return start, start + float(event.get("dur", 0.0))


def trace_split(run: Callable[[], object], device: torch.device) -> Split | None:
    """Run something under torch's profiler and split its time; None where nothing was traced.

    On a GPU only the device is traced, so that the host is not slowed down.
    """
    on_cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
    profiler = torch.profiler.profile(activities=[activity])
    with without_lines(CHATTER):
        profiler.start()
        run()
        if on_cuda:
            torch.cuda.synchronize(device)
        profiler.stop()
    events = _events(profiler)
    return (device_timeline(events) if on_cuda else host_timeline(events)).split()


def _events(profiler: torch.profiler.profile) -> list[Mapping[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return list(json.loads(file.read_text(encoding="utf-8", errors="replace"))["traceEvents"])

"""How busy the machine was before a run: what else ran there is in every number."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from tunesmith.hardware import usable_cores

BUSY_RATIO = 0.5
LOOK_S = 0.3
"""How long it is looked. This process sleeps meanwhile, so that nothing of what is seen is its own."""
_STAT = Path("/proc/stat")
_IDLE = slice(3, 5)  # idle, and waiting for a disk
_ALL = slice(0, 8)  # what guests take is in user's time already


def machine_load(look_s: float = LOOK_S, stat: Path = _STAT) -> dict[str, Any]:
    """busy_cores: of the usable `cores`, how many others keep busy now; load_average of the last minute; is_busy.

    The load average alone says nothing of now: an installation, or our own start, is in it for a minute after it has
    ended. It takes the place of busy_cores where the system does not tell its cores' times.
    """
    load, cores = os.getloadavg()[0], usable_cores()
    before = _core_times(stat)
    if before is not None:
        time.sleep(look_s)
    ratio = _busy_ratio(before, _core_times(stat))
    busy = load if ratio is None else ratio * cores
    return {"load_average": load, "busy_cores": busy, "cores": cores, "is_busy": busy > BUSY_RATIO * cores}


def _core_times(stat: Path) -> tuple[int, int] | None:
    """Ticks that the cores this process may run on were idle, and in all; None where the system does not tell."""
    try:
        lines = [line.split() for line in stat.read_text(encoding="ascii").splitlines()]
        ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    times = [[int(ticks) for ticks in line[1:]] for line in lines if line and line[0] in ours]
    return sum(sum(one[_IDLE]) for one in times), sum(sum(one[_ALL]) for one in times)


def _busy_ratio(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    """The share of the ticks between two looks in which cores worked; None where none passed."""
    if before is None or after is None or after[1] <= before[1]:
        return None
    idle = min(max(after[0] - before[0], 0), after[1] - before[1])  # a core's idle time may go back by a tick
    return 1 - idle / (after[1] - before[1])

"""How busy the machine was before a run: what else ran there is in every number."""

from __future__ import annotations

import os
from typing import Any

from tunesmith.hardware import usable_cores

BUSY_RATIO = 0.5


def machine_load() -> dict[str, Any]:
    """load_average of the last minute, the usable cores, and whether that is busy."""
    load, cores = os.getloadavg()[0], usable_cores()
    return {"load_average": load, "cores": cores, "is_busy": load > BUSY_RATIO * cores}

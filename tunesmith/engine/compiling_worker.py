"""The program that compiles an engine's kernels: `python -m tunesmith.engine.compiling_worker`.

    stdin:   {"asked": {...}, "marker": path}

The rest as `kernels/compiling_worker.py` says.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from tunesmith.kernels.compiling_worker import serve

if TYPE_CHECKING:
    from tunesmith.kernels.chip import Chip
    from tunesmith.kernels.warm_up import Launch


def find(request: dict[str, Any], chip: Chip) -> list[Launch]:
    """The launches of an engine."""
    from tunesmith.engine.asked import Asked
    from tunesmith.engine.launches import launches_of

    return launches_of(Asked(**request["asked"]), chip)


def device_of(request: dict[str, Any]) -> str:
    """The engine's device."""
    return str(request["asked"]["device"])


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # what has to be fetched is fetched by the engine's process
    serve(find, device_of)

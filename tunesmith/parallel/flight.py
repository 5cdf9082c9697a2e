"""torch's flight recorder, written out: the last collectives of a rank, and with NCCL which of them had not ended.

`tunesmith launch --debug` turns it on. torch writes it when a collective of NCCL times out, which is after the watchdog
has ended the processes, and never for gloo; so the watchdog writes it. gloo's has no state of a collective, and under
TORCH_DISTRIBUTED_DEBUG=DETAIL the one that a rank waits in is not among them yet: that stands in the rank's stack.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

SIZE = "TORCH_FR_BUFFER_SIZE"
"""How many collectives torch keeps; none where it is not set."""
_RECORDERS = {"flight": "_dump_fr_trace_json", "flight-nccl": "_dump_nccl_trace_json"}
"""gloo's, and NCCL's, which builds of torch for a CPU lack."""


def is_recording() -> bool:
    """Whether torch was told to keep collectives."""
    return os.environ.get(SIZE, "0") not in ("", "0")


def write_flight(folder: Path, rank: int) -> list[Path]:
    """Write what this rank's recorders hold to folder/flight-rank-N.json and flight-nccl-rank-N.json.

    Returns: the files; none where nothing is kept, or where torch has no recorder. Raises nothing.
    """
    if not is_recording():
        return []
    from torch._C import _distributed_c10d as native

    written: list[Path] = []
    for name, function in _RECORDERS.items():
        dump: Any = getattr(native, function, None)
        if dump is None:
            continue
        with contextlib.suppress(Exception):  # the process ends, and its last line matters more
            text = dump()
            kept = json.loads(text)
            if kept.get("entries"):
                path = folder / f"{name}-rank-{rank}.json"
                path.write_text(json.dumps(kept, indent=1), encoding="utf-8")
                written.append(path)
    return written

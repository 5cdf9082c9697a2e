"""What the NVIDIA driver says of this machine's GPUs, asked without starting CUDA: their number, and who reaches whom.

A launcher must not hold memory on a GPU, so the driver's library is called directly: it answers before there is a
context. CUDA_VISIBLE_DEVICES holds, as it will for the processes that are started.
"""

from __future__ import annotations

import ctypes
from itertools import permutations
from typing import Any


def driver() -> Any | None:
    """The driver's library, ready to be asked; None where there is no driver, or no GPU."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return library if library.cuInit(0) == 0 else None


def gpu_count(library: Any | None) -> int:
    """GPUs that a process started from here will see."""
    count = ctypes.c_int(0)
    if library is None or library.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def pairs_without_peer_access(library: Any | None, count: int) -> list[tuple[int, int]]:
    """Which of the first `count` GPUs can't read each other's memory over the bus: (lower, higher) numbers."""
    if library is None:
        return []
    blind = {tuple(sorted(pair)) for pair in permutations(range(count), 2) if not _reaches(library, *pair)}
    return sorted((low, high) for low, high in blind)


def _reaches(library: Any, device: int, peer: int) -> bool:
    """Whether `device` can read `peer`'s memory. A driver that does not answer is not held against the pair."""
    able = ctypes.c_int(1)
    handles = ctypes.c_int(0), ctypes.c_int(0)
    for number, handle in zip((device, peer), handles, strict=True):
        if library.cuDeviceGet(ctypes.byref(handle), number) != 0:
            return True
    library.cuDeviceCanAccessPeer(ctypes.byref(able), *handles)
    return bool(able.value)

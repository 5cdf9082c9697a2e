"""CUDA started while torch is still being imported: the driver takes seconds for a context, and needs no Python.

torch takes up the context that it finds. This module imports nothing that takes long.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading

_AT_EXIT_S = 10.0


class CudaStart:
    """A context under way in a thread. Whatever fails there fails again in torch, which has the words for it."""

    def __init__(self, cuda: ctypes.CDLL, index: int) -> None:
        self._thread = threading.Thread(target=_retain, args=(cuda, index), name="cuda", daemon=True)
        self._thread.start()
        # A process that ends in the middle of the driver's start may crash there.
        atexit.register(self._thread.join, _AT_EXIT_S)

    def wait(self) -> None:
        """Until the context is there. Ctrl-C ends the waiting; a call of torch would wait with Python's lock held."""
        self._thread.join()


def start_cuda(device: str) -> CudaStart | None:
    """Begin to make the context of a recipe's device; None where it names none, or there is no driver."""
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cuda") or (index and not index.isdecimal()):
        return None
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as torch sets it; the driver looks once
    return CudaStart(cuda, int(index or 0))


def _retain(cuda: ctypes.CDLL, index: int) -> None:
    """The device's primary context, which all of a process's libraries share, and keep until its end."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), index) == 0:
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)

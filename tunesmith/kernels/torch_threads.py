"""The threads that torch's own operators run on: where libgomp's functions lie, and the cores of its threads."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from tunesmith.kernels.cpu_compile import BuildError


def address_in_libgomp(name: str) -> int:
    """The address of a function of the OpenMP library that torch has loaded. Raises: BuildError."""
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise BuildError("torch's OpenMP library can't be found: no /proc/self/maps") from error
    files = {line.split(maxsplit=5)[5] for line in mapped.splitlines() if "libgomp" in line}
    beside_torch = [file for file in sorted(files) if Path(torch.__file__).parent.parent in Path(file).parents]
    for file in beside_torch or sorted(files):
        address = ctypes.cast(getattr(ctypes.CDLL(file), name), ctypes.c_void_p).value
        if address is not None:
            return address
    raise BuildError("torch runs without libgomp")


class _TorchThreads(ctypes.Structure):
    _fields_ = [("fork", ctypes.c_void_p), ("number", ctypes.c_void_p)]


@cache
def _functions() -> _TorchThreads | None:
    try:
        return _TorchThreads(address_in_libgomp("GOMP_parallel"), address_in_libgomp("omp_get_thread_num"))
    except (BuildError, OSError, AttributeError):
        return None


def bind(library: ctypes.CDLL) -> None:
    """The calling thread's helpers in torch to a core each, where those of `library` (cpu_library.py) have one each.

    Two of them on one core wait for each other at every operation; TUNESMITH_CPU_BIND=0 leaves them where they are.
    """
    functions, threads = _functions(), torch.get_num_threads()
    if functions is not None and threads > 1:
        library.tunesmith_bind_torch(ctypes.byref(functions), threads)

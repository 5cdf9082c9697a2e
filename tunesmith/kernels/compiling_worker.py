"""What the programs share that compile kernels for others (`compiling.start_worker`).

    stdin:   {..., "marker": path}
    stdout:  {"kernels": number, "processes": number, "duration_s": number, "failed": [names]}

They ask CUDA's driver which chip there is, and take no memory on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.hardware import usable_cores

if TYPE_CHECKING:  # torch is imported where there is a GPU
    from tunesmith.kernels.chip import Chip
    from tunesmith.kernels.warm_up import Launch

# Of CUdevice_attribute: COMPUTE_CAPABILITY_MAJOR and _MINOR, MULTIPROCESSOR_COUNT.
_ATTRIBUTES = (75, 76, 16)
_MOST_PROCESSES = 16
Finds = Callable[[dict[str, Any], "Chip"], "list[Launch]"]
"""A request, and the chip that is compiled for -> the launches that it will make."""


def serve(finds: Finds, device: Callable[[dict[str, Any]], str]) -> None:
    """Read the request, compile, answer. device: the name of the request's device (auto, cuda, cuda:N)."""
    request = json.load(sys.stdin)
    numbers = chip_numbers(device_index(device(request)))
    answer: dict[str, Any] = {"kernels": 0}
    if numbers is not None:
        answer = work(finds, request, numbers, num_processes())
        if answer["kernels"] and not answer["failed"]:
            with contextlib.suppress(OSError):  # a full disk
                Path(request["marker"]).touch()
    json.dump(answer, sys.stdout)


def work(finds: Finds, request: dict[str, Any], numbers: tuple[int, int, int], processes: int) -> dict[str, Any]:
    """Find out which kernels are launched, and compile them for a chip of this capability and so many processors."""
    began = time.perf_counter()
    from tunesmith.kernels.chip import Chip
    from tunesmith.kernels.warm_up import compile_all

    major, minor, processors = numbers
    launches = finds(request, Chip((major, minor), processors))
    done = compile_all(launches, (major, minor), processes)
    return {**vars(done), "failed": list(done.failed), "duration_s": time.perf_counter() - began}


def chip_numbers(index: int = 0) -> tuple[int, int, int] | None:
    """Compute capability, major and minor, and processors of a visible GPU, by CUDA's driver. None: no GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), index):
        return None
    values = [ctypes.c_int() for _ in _ATTRIBUTES]
    for attribute, value in zip(_ATTRIBUTES, values, strict=True):
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    major, minor, processors = (value.value for value in values)
    return major, minor, processors


def device_index(device: str) -> int:
    """The number of a device's name; 0 where it has none."""
    _, _, index = device.partition(":")
    return int(index or 0)


def num_processes() -> int:
    """One core is left to the program that waits."""
    return max(1, min(_MOST_PROCESSES, usable_cores() - 1))

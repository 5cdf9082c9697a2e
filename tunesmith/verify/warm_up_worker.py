"""The program that compiles a recipe's kernels: `python -m tunesmith.verify.warm_up_worker`.

    stdin:   {"recipe": {...}, "marker": path}
    stdout:  {"kernels": number, "processes": number, "duration_s": number, "failed": [names]}

It asks CUDA's driver which chip there is, and takes no memory on it.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_FIRST_BF16 = (8, 0)
_MOST_PROCESSES = 16


def main() -> None:
    """Read the request, compile, answer."""
    request = json.load(sys.stdin)
    capability = compute_capability(_device_index(request["recipe"]))
    answer = {"kernels": 0} if capability is None else work(request["recipe"], capability, _num_processes())
    if answer["kernels"] and not answer["failed"]:
        Path(request["marker"]).touch()
    json.dump(answer, sys.stdout)


def work(raw: dict[str, Any], capability: tuple[int, int], processes: int) -> dict[str, Any]:
    """Find out which kernels a recipe launches, and compile them for a chip."""
    began = time.perf_counter()
    from tunesmith.kernels.warm_up import compile_all
    from tunesmith.recipe.load import recipe_from_mapping
    from tunesmith.verify.launches import launches_of

    launches = launches_of(recipe_from_mapping(raw), has_bf16=capability >= _FIRST_BF16)
    done = compile_all(launches, capability, processes)
    return {**vars(done), "failed": list(done.failed), "duration_s": time.perf_counter() - began}


def compute_capability(index: int = 0) -> tuple[int, int] | None:
    """Of a visible GPU, by CUDA's driver; None where there is none."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), index):
        return None
    for attribute, value in ((_MAJOR, major), (_MINOR, minor)):
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    return major.value, minor.value


def _device_index(raw: dict[str, Any]) -> int:
    _, _, index = str(raw["model"].get("device", "auto")).partition(":")  # a recipe need not name it
    return int(index or 0)


def _num_processes() -> int:
    """One core is left to the program that waits."""
    return max(1, min(_MOST_PROCESSES, len(os.sched_getaffinity(0)) - 1))


if __name__ == "__main__":
    main()

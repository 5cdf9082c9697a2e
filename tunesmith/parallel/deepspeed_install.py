"""DeepSpeed itself: imported here, quietly, and without compiling what torch has too; what it lacks on this machine."""

from __future__ import annotations

import ctypes.util
import importlib.util
import logging
import os
import shutil
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from tunesmith.errors import MissingExtraError
from tunesmith.watch.doctor import Finding

NVME = "DeepSpeed's async_io operator, which offload to NVMe goes through"
_HEADER = "libaio.h"
_WARNINGS = (
    r".*(all_gather_into_tensor|reduce_scatter_tensor).* is deprecated",  # torch 2.13 has other names for them
    r"Full backward hook is firing when gradients are computed with respect to module outputs",  # as it should
)


def require_deepspeed(device_type: str) -> Any:
    """The module, told which accelerator it runs on. Raises: MissingExtraError.

    On a CPU its collectives stay gloo's: it would compile its own wherever it finds a compiler.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise MissingExtraError("deepspeed", "deepspeed")
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if device_type == "cpu" else "cuda")
    import deepspeed

    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    if "DS_LOG_LEVEL" not in os.environ:
        deepspeed.utils.logger.setLevel(logging.ERROR)
    if device_type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def nvme_lacks(with_cuda: bool) -> list[str]:
    """What building the operator for NVMe offload lacks on this machine; empty where nothing."""
    lacks = []
    if shutil.which("c++") is None and shutil.which("g++") is None:
        lacks.append("a C++ compiler")
    if ctypes.util.find_library("aio") is None:
        lacks.append("libaio")
    if not any((Path(folder) / _HEADER).is_file() for folder in ("/usr/include", "/usr/local/include")):
        lacks.append(f"libaio's {_HEADER}")
    if with_cuda and shutil.which("nvcc") is None:
        lacks.append("the CUDA toolkit (nvcc)")
    return lacks


def nvme_mend(lacks: list[str]) -> str:
    """The command that brings it."""
    packages = ["libaio-dev" for lack in lacks if "libaio" in lack][:1] + ["g++" for lack in lacks if "C++" in lack]
    install = f"sudo apt-get install -y {' '.join(packages)}" if packages else ""
    toolkit = "install the CUDA toolkit of torch's CUDA version" if any("nvcc" in lack for lack in lacks) else ""
    return ", and ".join(filter(None, (install, toolkit)))


def deepspeed_findings(with_cuda: bool) -> list[Finding]:
    """What `doctor` says about DeepSpeed; imports nothing heavy."""
    if importlib.util.find_spec("deepspeed") is None:
        detail = "not installed: needed for parallel.engine deepspeed only"
        return [Finding("deepspeed", "note", detail, "pip install 'tunesmith[deepspeed]'")]
    lacks = nvme_lacks(with_cuda)
    places = "to the CPU" if lacks else "to the CPU and to NVMe (whose operator is compiled at its first use: minutes)"
    found = [Finding("deepspeed", "ok", f"{metadata.version('deepspeed')}, ZeRO-1 to 3 and offload {places}")]
    if lacks:
        found.append(Finding("deepspeed nvme", "note", f"{NVME}, lacks {', '.join(lacks)}", nvme_mend(lacks)))
    return found

"""What a measurement was made on: chip, driver, versions, commit, clocks.

Reads NVML and files only: it never starts a CUDA context, so that a parent may call it and then fork.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from tunesmith import __version__

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "peft",
    "bitsandbytes",
    "datasets",
    "triton",
    "accelerate",
    "deepspeed",
)


def environment_fingerprint() -> dict[str, Any]:
    """The environment of this process as plain data. What can't be known is None."""
    return {
        "tunesmith": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": package_versions(),
        "torch_cuda": _torch_cuda(),
        "cpu": {"name": cpu_name(), "cores": os.cpu_count(), "usable_cores": usable_cores()},
        "memory_bytes": total_memory_bytes(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "driver": driver_version(),
        "gpus": [_gpu_facts(*pair) for pair in nvml_devices()],
        "git": git_commit(),
    }


def package_versions() -> dict[str, str]:
    """The installed versions of what can change a number."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _torch_cuda() -> str | None:
    import torch

    return torch.version.cuda


@cache
def cpu_name() -> str | None:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def total_memory_bytes() -> int:
    """The machine's memory, or the control group's limit where that is lower."""
    import psutil

    total = int(psutil.virtual_memory().total)
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return total


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """The NVML module, started; None where there is no library or no driver."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def driver_version() -> str | None:
    """The NVIDIA driver's version, or None without one."""
    with _nvml() as nvml:
        if nvml is not None:
            return _text(nvml.nvmlSystemGetDriverVersion())
    with contextlib.suppress(OSError):
        first = Path("/proc/driver/nvidia/version").read_text(encoding="ascii").splitlines()[0]
        return next((word for word in first.split() if word[0].isdigit() and "." in word), None)
    return None


def nvml_devices() -> list[tuple[Any, Any]]:
    """(module, handle) of every GPU that NVML sees; an empty list where there is none."""
    with _nvml() as nvml:
        if nvml is None:
            return []
        nvml.nvmlInit()  # a second reference: handles stay valid for the caller
        return [(nvml, nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(nvml.nvmlDeviceGetCount())]


def _gpu_facts(nvml: Any, handle: Any) -> dict[str, Any]:
    def ask(function: Any, *arguments: Any) -> Any:
        try:
            return function(handle, *arguments)
        except nvml.NVMLError:
            return None

    memory = ask(nvml.nvmlDeviceGetMemoryInfo)
    return {
        "name": _text(ask(nvml.nvmlDeviceGetName)),
        "memory_bytes": None if memory is None else int(memory.total),
        "sm_clock_mhz": ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
        "max_sm_clock_mhz": ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
        "power_limit_mw": ask(nvml.nvmlDeviceGetEnforcedPowerLimit),
    }


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value


def git_commit() -> dict[str, Any] | None:
    """The commit of the checkout that tunesmith runs from, and whether it was changed; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

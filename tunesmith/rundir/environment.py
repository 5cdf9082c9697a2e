"""What a measurement was made on: chip, driver, versions, commit, clocks.

Reads NVML and files only: it never starts a CUDA context, so that a parent may call it and then fork.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tunesmith import __version__
from tunesmith.hardware import (
    ask_nvml,
    cpu_name,
    driver_version,
    nvml_devices,
    total_memory_bytes,
    usable_cores,
)

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
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# The C library's, by the variables that glibc and what is preloaded in its place read them from.
HOST_ALLOCATOR_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
# What this process has told the C library's allocator; whoever tells it writes it here, since it can't be asked.
HOST_ALLOCATOR: dict[str, int] = {}


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
        "cuda_allocator": _settings(ALLOCATOR_VARIABLES),
        "host_allocator": {**_settings(HOST_ALLOCATOR_VARIABLES), **HOST_ALLOCATOR},
        "driver": driver_version(),
        "gpus": [_gpu_facts(handle) for handle in nvml_devices()],
        "git": git_commit(),
    }


def package_versions() -> dict[str, str]:
    """The installed versions of what can change a number."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _settings(variables: Sequence[str]) -> dict[str, str]:
    """The settings of an allocator, by the variables that it reads them from."""
    return {name: os.environ[name] for name in variables if name in os.environ}


def _torch_cuda() -> str | None:
    import torch

    return torch.version.cuda


def _gpu_facts(handle: Any) -> dict[str, Any]:
    memory = ask_nvml("nvmlDeviceGetMemoryInfo", handle)
    clocks = {"sm_clock_mhz": ("nvmlDeviceGetClockInfo", 1), "memory_clock_mhz": ("nvmlDeviceGetClockInfo", 2)}
    clocks["max_sm_clock_mhz"] = ("nvmlDeviceGetMaxClockInfo", 1)
    return {
        "name": ask_nvml("nvmlDeviceGetName", handle),
        "memory_bytes": None if memory is None else int(memory.total),
        **{key: ask_nvml(function, handle, clock) for key, (function, clock) in clocks.items()},
        "power_limit_mw": ask_nvml("nvmlDeviceGetEnforcedPowerLimit", handle),
    }


def git_commit() -> dict[str, Any] | None:
    """The commit of the checkout that tunesmith runs from, and whether it was changed (None: not known).

    Outside a checkout the commit that an archive of git carries (`git archive` fills in commit.txt), or None.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return _archived(Path(__file__).with_name("commit.txt"))
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _archived(path: Path) -> dict[str, Any] | None:
    try:
        said = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return {"commit": said, "dirty": None} if len(said) == 40 and set(said) <= set("0123456789abcdef") else None


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

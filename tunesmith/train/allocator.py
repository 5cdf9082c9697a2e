"""How memory is taken: torch's GPU allocator reads its settings when CUDA starts; on a CPU it is the C library's."""

from __future__ import annotations

import ctypes
import os
import platform
import sys

import torch

from tunesmith.errors import DeviceError
from tunesmith.rundir.environment import ALLOCATOR_VARIABLES, HOST_ALLOCATOR, HOST_ALLOCATOR_VARIABLES
from tunesmith.units import GB, GIB, MIB

SETTINGS = "expandable_segments:True"
# The numbers of glibc's <malloc.h>: both are part of its binary interface.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Larger tensors are rare and live long. A glibc that refuses this takes its own default maximum.
KEPT_BYTES, _GLIBC_MAXIMUM_BYTES = GIB, 32 * MIB


def prepare_allocator(device: str) -> None:
    """Take memory so that steps after the first find it where the last left it.

    GPU: segments that grow instead of new ones beside them, so that blocks of varying sizes leave no holes.
    CPU, with glibc: freed memory stays with the process. By default a large tensor is mapped anew and unmapped when it
    is freed, and the kernel clears each of its pages every time. The price: the process holds on to its peak.

    The user's own settings win, by whichever variable; a process whose CUDA has started keeps what it has. The
    environment's record in the run directory has what holds.

    Args:
        device: as a recipe names it.
    """
    if sys.platform != "linux":
        return
    if device == "cpu":
        _keep_host_memory()
        return
    unset = not any(name in os.environ for name in ALLOCATOR_VARIABLES)
    if unset and not torch.cuda.is_initialized():
        os.environ[ALLOCATOR_VARIABLES[0]] = SETTINGS


def cap_device_memory(device: torch.device, most_gb: float | None) -> None:
    """Let torch take so many 10^9 bytes of a GPU in this process, until it is told otherwise; None: as it was told.

    What the driver and its libraries take for themselves, some hundreds of megabytes, comes on top.
    Raises: DeviceError where there is no GPU, or it has less.
    """
    if most_gb is None:
        return
    if device.type != "cuda":
        raise DeviceError(
            f"train.device_memory_gb is for a GPU, and the device is {device}: use --set train.device_memory_gb=null"
        )
    total = torch.cuda.get_device_properties(device).total_memory
    most = most_gb * GB
    if most > total:
        raise DeviceError(
            f"train.device_memory_gb is {most_gb:g}, and {device} has {total / GB:.1f}: use "
            f"--set train.device_memory_gb={total // GB}, or null"
        )
    torch.cuda.set_per_process_memory_fraction(most / total, device)


def _keep_host_memory() -> None:
    """Tell glibc, once; nothing where the C library is another one or the user has told it something else."""
    if HOST_ALLOCATOR or any(name in os.environ for name in HOST_ALLOCATOR_VARIABLES):
        return
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    taken = next((size for size in (KEPT_BYTES, _GLIBC_MAXIMUM_BYTES) if mallopt(_M_MMAP_THRESHOLD, size)), None)
    if taken is not None and mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES):
        HOST_ALLOCATOR.update(mmap_threshold_bytes=taken, trim_threshold_bytes=KEPT_BYTES)

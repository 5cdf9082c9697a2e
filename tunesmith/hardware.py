"""What device is this: its name, memory, and peaks with their source. What is not known is None.

Peaks are the vendor's dense numbers (no sparsity), with float32 accumulation where a chip has slower products then:
it is what training does. Only a chip whose full name is in the table has peaks; a partition of one (MIG) has none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.errors import DeviceError, RecipeError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
_T = 1e12


@dataclass(frozen=True)
class Chip:
    """The data sheet's numbers: products per second by dtype, bytes per second to memory."""

    float32: float
    tf32: float | None
    half: float
    float8: float | None
    int8: float | None
    bandwidth: float
    source: str
    has_bfloat16: bool = True

    def peaks(self) -> dict[str, float]:
        """Peak FLOP/s (integer operations for int8) by dtype name, without what the chip lacks."""
        known = {
            "float32": self.float32,
            "tf32": self.tf32,
            "bfloat16": self.half if self.has_bfloat16 else None,
            "float16": self.half,
            "float8": self.float8,
            "int8": self.int8,
        }
        return {name: value * _T for name, value in known.items() if value is not None}


_A100 = "NVIDIA A100 data sheet"
_H100 = "NVIDIA H100 data sheet"
_H200 = "NVIDIA H200 data sheet"
_GA102 = "NVIDIA Ampere GA102 architecture white paper"
_ADA = "NVIDIA Ada architecture white paper"
CHIPS: Mapping[str, Chip] = {
    "NVIDIA A100-SXM4-40GB": Chip(19.5, 156, 312, None, 624, 1.555, _A100),
    "NVIDIA A100-SXM4-80GB": Chip(19.5, 156, 312, None, 624, 2.039, _A100),
    "NVIDIA A100-PCIE-40GB": Chip(19.5, 156, 312, None, 624, 1.555, _A100),
    "NVIDIA A100 80GB PCIe": Chip(19.5, 156, 312, None, 624, 1.935, _A100),
    "NVIDIA H100 80GB HBM3": Chip(66.9, 494.7, 989.4, 1978.9, 1978.9, 3.35, _H100),
    "NVIDIA H100 PCIe": Chip(51.2, 378, 756, 1513, 1513, 2.0, _H100),
    "NVIDIA H100 NVL": Chip(60, 417.5, 835.5, 1671, 1671, 3.9, _H100),
    "NVIDIA H200": Chip(66.9, 494.7, 989.4, 1978.9, 1978.9, 4.8, _H200),
    "NVIDIA H200 NVL": Chip(60, 417.5, 835.5, 1671, 1671, 4.8, _H200),
    "NVIDIA B200": Chip(75, 1125, 2250, 4500, 4500, 8.0, "NVIDIA HGX B200 data sheet"),
    "NVIDIA RTX A6000": Chip(38.7, 77.4, 154.8, None, 309.7, 0.768, _GA102),
    "NVIDIA A40": Chip(37.4, 74.8, 149.7, None, 299.3, 0.696, "NVIDIA A40 data sheet"),
    "NVIDIA A10": Chip(31.2, 62.5, 125, None, 250, 0.6, "NVIDIA A10 data sheet"),
    "NVIDIA GeForce RTX 3090": Chip(35.6, 35.6, 71.2, None, 284.7, 0.936, _GA102),
    "NVIDIA GeForce RTX 4090": Chip(82.6, 82.6, 165.2, 330.3, 660.6, 1.008, _ADA),
    "NVIDIA RTX 6000 Ada Generation": Chip(91.1, 182.1, 364.2, 728.5, 728.5, 0.96, "NVIDIA RTX 6000 Ada data sheet"),
    "NVIDIA GeForce RTX 5090": Chip(
        104.8, 104.8, 209.5, 419.0, 838.0, 1.792, "NVIDIA RTX Blackwell architecture white paper"
    ),
    "NVIDIA L40S": Chip(91.6, 183.2, 362.1, 733.2, 733.2, 0.864, "NVIDIA L40S data sheet"),
    "NVIDIA L4": Chip(30.3, 60.5, 121, 242.5, 242.5, 0.3, "NVIDIA L4 data sheet"),
    "Tesla T4": Chip(8.1, None, 65, None, 130, 0.32, "NVIDIA T4 data sheet", has_bfloat16=False),
}


@dataclass(frozen=True)
class Generation:
    """What all chips of one compute capability have.

    fp8: products of e4m3 codes, and the conversion to them in Triton, which is refused before.
    shared_bytes: the most shared memory that a block of threads may ask for.
    """

    chips: str
    has_bfloat16: bool
    has_fp8: bool
    shared_bytes: int


FIRST_BFLOAT16, FIRST_FP8 = (8, 0), (8, 9)
_KIB = 1024
# Shared memory: CUDA C++ programming guide, technical specifications per compute capability.
GENERATIONS: Mapping[tuple[int, int], Generation] = {
    (7, 5): Generation("T4, RTX 20", False, False, 64 * _KIB),
    (8, 0): Generation("A100, A30", True, False, 163 * _KIB),
    (8, 6): Generation("A6000, A40, A10, RTX 30", True, False, 99 * _KIB),
    (8, 9): Generation("L40S, L4, RTX 6000 Ada, RTX 40", True, True, 99 * _KIB),
    (9, 0): Generation("H100, H200", True, True, 227 * _KIB),
    (10, 0): Generation("B200", True, True, 227 * _KIB),
    (12, 0): Generation("RTX PRO 6000 Blackwell, RTX 50", True, True, 99 * _KIB),
}


@dataclass(frozen=True)
class DeviceInfo:
    """One device. Peaks are FLOP/s by dtype name; unknown is None (or absent from `peak_flops_per_s`)."""

    kind: Literal["cpu", "cuda"]
    name: str
    memory_bytes: int
    peak_flops_per_s: Mapping[str, float] = field(default_factory=dict)
    peak_source: str | None = None
    bandwidth_bytes_per_s: float | None = None
    capability: tuple[int, int] | None = None
    cores: int | None = None

    def peak(self, dtype: str | torch.dtype) -> float | None:
        """Peak FLOP/s for products in `dtype`, given as torch's or by name ("bfloat16", "tf32"); None if unknown."""
        return self.peak_flops_per_s.get(str(dtype).removeprefix("torch."))


def describe_device(device: str | torch.device) -> DeviceInfo:
    """What `device` is. Raises: DeviceError when it is not there."""
    chosen = pick_device(str(device))
    return _describe_cpu() if chosen.type == "cpu" else _describe_gpu(chosen)


def pick_device(asked: str = "auto") -> torch.device:
    """The device that a recipe's model.device names: auto (a GPU where torch can use one), cpu, cuda or cuda:N.

    Raises: RecipeError for a name that no device has; DeviceError for one that is not there, or that torch can't use.
    """
    import torch

    if asked == "auto":
        _warn_of_idle_gpu()
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    kind, _, index = asked.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()) or (kind == "cpu" and index not in ("", "0")):
        raise RecipeError(f"model.device must be auto, cpu, cuda or cuda:N, got {asked!r}")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError(
            f"{asked} was asked for, and {_why_no_cuda()}. tunesmith doctor shows what was found; to go on without a "
            f"GPU: --set model.device=cpu"
        )
    number = int(index) if index else torch.cuda.current_device()
    if number >= torch.cuda.device_count():
        raise DeviceError(
            f"{asked} was asked for, and there are {torch.cuda.device_count()} CUDA devices (0 is the first)"
        )
    return torch.device("cuda", number)


def _why_no_cuda() -> str:
    """Why torch can use no CUDA device, as far as it can be told here."""
    import torch

    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    if nvml_devices():
        return "torch can't use the NVIDIA GPU that is here"
    return "no NVIDIA GPU with a working driver is found here"


@cache
def _warn_of_idle_gpu() -> None:
    import torch

    if nvml_devices() and not torch.cuda.is_available():
        log.warning("there is a GPU that torch can't use, so the CPU is taken: tunesmith doctor says why")


def supports_bf16(device: str | torch.device) -> bool:
    """Whether bfloat16 is the device's own and so the faster choice: GPUs from sm_80 on; no CPU counts as one."""
    import torch

    chosen = torch.device(device)
    return chosen.type == "cuda" and torch.cuda.get_device_capability(chosen) >= FIRST_BFLOAT16


def _describe_cpu() -> DeviceInfo:
    return DeviceInfo("cpu", cpu_name() or "CPU", total_memory_bytes(), cores=usable_cores())


def _describe_gpu(device: torch.device) -> DeviceInfo:
    import torch

    properties = torch.cuda.get_device_properties(device)
    chip = CHIPS.get(properties.name)
    return DeviceInfo(
        "cuda",
        properties.name,
        int(properties.total_memory),
        peak_flops_per_s={} if chip is None else chip.peaks(),
        peak_source=None if chip is None else chip.source,
        bandwidth_bytes_per_s=None if chip is None else chip.bandwidth * _T,
        capability=(properties.major, properties.minor),
    )


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


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping; within the control group's limit where that leaves less."""
    import psutil

    available = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, KeyError):
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        reclaimable = int(dict(line.split() for line in lines)["inactive_file"])
        available = min(available, max(0, limit - used + reclaimable))
    return available


@cache
def nvml() -> Any | None:
    """The NVML module, started once for this process; None without the package or a driver. Starts no CUDA context."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def nvml_devices() -> list[Any]:
    """NVML's handle of every GPU, in the driver's order; an empty list where there is none."""
    module = nvml()
    if module is None:
        return []
    return [module.nvmlDeviceGetHandleByIndex(index) for index in range(module.nvmlDeviceGetCount())]


def ask_nvml(function: str, handle: Any, *arguments: Any) -> Any | None:
    """The answer of one NVML function about one GPU, or None where the chip doesn't tell."""
    module = nvml()
    if module is None:
        return None
    try:
        answer = getattr(module, function)(handle, *arguments)
    except module.NVMLError:
        return None
    return answer.decode() if isinstance(answer, bytes) else answer


def driver_version() -> str | None:
    """The NVIDIA driver's version, or None without one."""
    module = nvml()
    if module is not None:
        version = module.nvmlSystemGetDriverVersion()
        return version.decode() if isinstance(version, bytes) else version
    with contextlib.suppress(OSError, IndexError):
        first = Path("/proc/driver/nvidia/version").read_text(encoding="ascii").splitlines()[0]
        return next((word for word in first.split() if word[0].isdigit() and "." in word), None)
    return None

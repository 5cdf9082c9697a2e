"""Memory, measured: three quantities that are never mixed.

- *device*: what torch's CUDA allocator handed out (allocated) and holds (reserved), at its highest.
- *resident*: the high-water mark of the process's pages, torch and Python included.
- *live storages* on a CPU: the bytes of tensors that are alive, counted operation by operation. It leaves out what an
  operation takes and gives back inside itself, and it slows everything: use it in a pass that is not timed.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_SAMPLE_PERIOD_S = 0.01


@dataclass(frozen=True)
class MemoryReading:
    """Peaks since the sampler was started, in bytes. Device figures are None on a CPU.

    `resident_source`: "high-water mark" (the kernel's, exact) or "sampled" (every 10 ms; a short peak may be missed).
    """

    resident_peak_bytes: int
    resident_source: str
    device_allocated_peak_bytes: int | None = None
    device_reserved_peak_bytes: int | None = None


class MemorySampler:
    """Peaks of device and resident memory between `start` and `read`; also a context manager."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._sampler: _ResidentSampler | None = None

    def start(self) -> None:
        """Set the peaks to what is in use now."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        self.stop()
        if not reset_resident_peak():
            self._sampler = _ResidentSampler()
            self._sampler.start()

    def read(self) -> MemoryReading:
        """The peaks since `start`."""
        resident, source = self._resident()
        if self._device.type != "cuda":
            return MemoryReading(resident, source)
        return MemoryReading(
            resident,
            source,
            device_allocated_peak_bytes=torch.cuda.max_memory_allocated(self._device),
            device_reserved_peak_bytes=torch.cuda.max_memory_reserved(self._device),
        )

    def _resident(self) -> tuple[int, str]:
        if self._sampler is not None:
            return self._sampler.peak(), "sampled"
        peak = resident_high_water_bytes()
        return (resident_bytes(), "sampled") if peak is None else (peak, "high-water mark")

    def stop(self) -> None:
        """End the sampling thread, if there is one."""
        if self._sampler is not None:
            self._sampler.stop()
            self._sampler = None

    def __enter__(self) -> MemorySampler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def resident_bytes() -> int:
    """Pages of this process that are in memory now."""
    return int(psutil.Process().memory_info().rss)


def resident_high_water_bytes() -> int | None:
    """The most that was resident since `reset_resident_peak` (or the start); None where the system doesn't tell."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def reset_resident_peak() -> bool:
    """Set the kernel's high-water mark to what is resident now; False where that is not allowed."""
    if resident_high_water_bytes() is None:
        return False
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


class _ResidentSampler:
    """A thread that looks at the resident size every few milliseconds and keeps the highest."""

    def __init__(self) -> None:
        self._highest = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="resident-memory", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._end.wait(_SAMPLE_PERIOD_S):
            self._highest = max(self._highest, int(process.memory_info().rss))

    def peak(self) -> int:
        return max(self._highest, resident_bytes())

    def stop(self) -> None:
        self._end.set()
        self._thread.join()


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of live tensor storages while it is entered: `current_bytes`, `peak_bytes`.

    A storage counts from the first operation that makes or touches it until nothing holds it; views share one. One
    that is resized in place, as FSDP2 frees what it gathered, counts by its old size until an operation touches it.

    Args: existing: tensors that count from the start, such as parameters; device_type: only storages there count.
    """

    def __init__(self, existing: Iterable[torch.Tensor] = (), *, device_type: str = "cpu") -> None:
        super().__init__()
        self.current_bytes = 0
        self.peak_bytes = 0
        self._device_type = device_type
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.track(existing)

    def track(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count the storages of `tensors` from now on."""
        for tensor in tensors:
            self._see(tensor)

    def reset_peak(self) -> None:
        """Set the peak to what is alive now."""
        self.peak_bytes = self.current_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation, then count what it was given and what it made."""
        kwargs = dict(kwargs or {})
        result = func(*args, **kwargs)
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor):
                self._see(value)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        if is_traceable_wrapper_subclass(tensor):  # a shard's own storage is a shell with the size of the whole
            inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
            self.track(value for value in inner if isinstance(value, torch.Tensor))
            return
        if tensor.device.type != self._device_type:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._alive.get(key)
        if known is not None and known[0]() is storage:
            if known[1] == size:
                return
            self.current_bytes -= known[1]  # resized in place
        self._alive[key] = (weakref.ref(storage, self._forget(key)), size)
        self.current_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)

    def _forget(self, key: int) -> Any:
        owner = weakref.ref(self)

        def forget(reference: weakref.ref[Any]) -> None:
            mode = owner()
            known = None if mode is None else mode._alive.get(key)
            if mode is not None and known is not None and known[0] is reference:
                mode.current_bytes -= known[1]
                del mode._alive[key]

        return forget

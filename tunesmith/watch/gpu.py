"""A thread that samples the GPUs through NVML: utilisation, memory, power, temperature."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from tunesmith.hardware import ask_nvml, nvml_devices

_TEMPERATURE_OF_THE_CHIP = 0  # NVML_TEMPERATURE_GPU


@dataclass(frozen=True)
class GpuSample:
    """One look at one GPU; what it doesn't tell is None."""

    utilisation_ratio: float | None
    memory_used_bytes: int | None
    power_w: float | None
    temperature_c: float | None


@dataclass(frozen=True)
class GpuSummary:
    """What one GPU did while it was watched."""

    num_samples: int
    mean_utilisation_ratio: float | None
    peak_memory_used_bytes: int | None
    mean_power_w: float | None
    peak_temperature_c: float | None


def sample_gpu(handle: Any) -> GpuSample:
    """Look at the GPU behind NVML's `handle` once."""
    utilisation = ask_nvml("nvmlDeviceGetUtilizationRates", handle)
    memory = ask_nvml("nvmlDeviceGetMemoryInfo", handle)
    power = ask_nvml("nvmlDeviceGetPowerUsage", handle)
    temperature = ask_nvml("nvmlDeviceGetTemperature", handle, _TEMPERATURE_OF_THE_CHIP)
    return GpuSample(
        utilisation_ratio=None if utilisation is None else utilisation.gpu / 100,
        memory_used_bytes=None if memory is None else int(memory.used),
        power_w=None if power is None else power / 1000,
        temperature_c=None if temperature is None else float(temperature),
    )


def summarise(samples: list[GpuSample]) -> GpuSummary:
    """Means and peaks over `samples`; None where no sample knew."""
    return GpuSummary(
        num_samples=len(samples),
        mean_utilisation_ratio=_mean([s.utilisation_ratio for s in samples]),
        peak_memory_used_bytes=max(
            (s.memory_used_bytes for s in samples if s.memory_used_bytes is not None), default=None
        ),
        mean_power_w=_mean([s.power_w for s in samples]),
        peak_temperature_c=max((s.temperature_c for s in samples if s.temperature_c is not None), default=None),
    )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


class GpuSampler:
    """Watches all GPUs between entering and leaving; without a GPU it does nothing and `summaries` is empty."""

    def __init__(self, period_s: float = 0.5, handles: list[Any] | None = None) -> None:
        self._period_s = period_s
        self._handles = nvml_devices() if handles is None else handles
        self._samples: list[list[GpuSample]] = [[] for _ in self._handles]
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gpu-sampler", daemon=True)

    def _watch(self) -> None:
        while True:
            for handle, samples in zip(self._handles, self._samples, strict=True):
                samples.append(sample_gpu(handle))
            if self._end.wait(self._period_s):
                return

    def latest(self) -> list[GpuSample | None]:
        """The newest sample of each GPU."""
        return [samples[-1] if samples else None for samples in self._samples]

    def summaries(self) -> list[GpuSummary]:
        """A summary of each GPU so far."""
        return [summarise(list(samples)) for samples in self._samples]

    def __enter__(self) -> GpuSampler:
        if self._handles:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

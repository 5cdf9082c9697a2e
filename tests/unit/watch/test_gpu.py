"""The GPU sampler, on a pretended NVML: what it doesn't tell is None; nothing happens without a GPU."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from tunesmith.watch import gpu
from tunesmith.watch.gpu import GpuSample, GpuSampler, sample_gpu, summarise


def _answers(function: str, handle: Any, *_: Any) -> Any:
    return {
        "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=50),
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=2_000, total=8_000),
        "nvmlDeviceGetPowerUsage": 350_000,
        "nvmlDeviceGetTemperature": None,
    }[function]


def test_a_sample_has_base_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ask_nvml", _answers)
    assert sample_gpu("handle") == GpuSample(0.5, 2_000, 350.0, None)


def test_a_summary_has_means_and_peaks_of_what_is_known() -> None:
    summary = summarise(
        [GpuSample(0.5, 10, None, 40.0), GpuSample(1.0, 30, None, 60.0), GpuSample(None, 20, None, None)]
    )
    assert summary.num_samples == 3
    assert summary.mean_utilisation_ratio == 0.75
    assert summary.peak_memory_used_bytes == 30
    assert summary.mean_power_w is None
    assert summary.peak_temperature_c == 60.0
    assert summarise([]).peak_memory_used_bytes is None


def test_the_thread_samples_as_often_as_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 0.05 s a sample never more than fit into the time, and two in five in one of many stretches of eight: a busy
    machine is late with some, or stands still for seconds."""
    monkeypatch.setattr(gpu, "ask_nvml", _answers)
    began = time.monotonic()
    with GpuSampler(period_s=0.05, handles=["a", "b"]) as sampler:
        stretch_s, seen = 60.0, 0
        while stretch_s >= 1:
            since = time.monotonic()
            while sampler.summaries()[0].num_samples < seen + 8:
                assert time.monotonic() - began < 60
                time.sleep(0.01)
            stretch_s, seen = time.monotonic() - since, sampler.summaries()[0].num_samples
    first, second = sampler.summaries()
    assert 8 <= first.num_samples <= 1 + (time.monotonic() - began) / 0.05
    assert second.mean_power_w == 350.0
    count = first.num_samples
    time.sleep(0.15)
    assert sampler.summaries()[0].num_samples == count
    assert sampler.latest()[0] == GpuSample(0.5, 2_000, 350.0, None)


def test_without_a_gpu_nothing_runs() -> None:
    with GpuSampler(handles=[]) as sampler:
        assert sampler.summaries() == []
        assert sampler.latest() == []

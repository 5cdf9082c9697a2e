"""Devices: what is known, what is None, and errors for what is not there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tunesmith import hardware
from tunesmith.errors import DeviceError, RecipeError
from tunesmith.hardware import (
    CHIPS,
    GENERATIONS,
    available_memory_bytes,
    describe_device,
    driver_version,
    nvml_devices,
    pick_device,
    supports_bf16,
)
from tunesmith.kernels.fp8 import has_fp8


def test_a_cpu_has_a_name_cores_and_memory_but_no_peak() -> None:
    info = describe_device("cpu")
    assert info.kind == "cpu"
    assert info.name
    assert info.cores is not None
    assert info.cores >= 1
    assert info.memory_bytes > 10**8
    assert info.peak("float32") is None
    assert info.bandwidth_bytes_per_s is None


def test_available_memory_is_some_of_what_there_is() -> None:
    assert 0 < available_memory_bytes() < describe_device("cpu").memory_bytes


@pytest.mark.parametrize("asked", ["gpu", "cuda:x", "cpu:1", "", "tpu"])
def test_a_device_that_is_no_device_is_refused(asked: str) -> None:
    with pytest.raises(RecipeError, match="must be auto, cpu, cuda or cuda:N"):
        pick_device(asked)


def test_asking_for_cuda_without_one_names_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="tunesmith doctor"):
        pick_device("cuda")
    assert pick_device("auto") == torch.device("cpu")


def test_a_device_number_that_is_too_high_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert pick_device("cuda") == torch.device("cuda", 0)
    with pytest.raises(DeviceError, match="cuda:3 was asked for, and there are 1"):
        pick_device("cuda:3")


def _pretend_gpu(monkeypatch: pytest.MonkeyPatch, name: str, major: int, minor: int) -> None:
    properties = SimpleNamespace(name=name, total_memory=80 * 10**9, major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, minor))


def test_a_known_chip_has_peaks_with_their_source(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_gpu(monkeypatch, "NVIDIA H200", 9, 0)
    info = describe_device("cuda")
    assert info.peak(torch.bfloat16) == pytest.approx(989.4e12)
    assert info.peak("float8") == pytest.approx(2 * 989.4e12, rel=1e-3)
    assert info.bandwidth_bytes_per_s == pytest.approx(4.8e12)
    assert info.peak_source
    assert supports_bf16("cuda")


def test_an_unknown_chip_and_a_partition_have_no_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NVIDIA H300", "NVIDIA A100-SXM4-80GB MIG 3g.40gb", "NVIDIA GeForce RTX 4090 Laptop GPU"):
        _pretend_gpu(monkeypatch, name, 9, 0)
        info = describe_device("cuda")
        assert info.peak("bfloat16") is None
        assert info.bandwidth_bytes_per_s is None
        assert info.peak_source is None


def test_a_turing_chip_has_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_gpu(monkeypatch, "Tesla T4", 7, 5)
    assert describe_device("cuda").peak("bfloat16") is None
    assert describe_device("cuda").peak("float16") == pytest.approx(65e12)
    assert not supports_bf16("cuda")


def test_a_cpu_is_not_faster_in_bfloat16() -> None:
    assert not supports_bf16("cpu")


@pytest.mark.parametrize("name", CHIPS)
def test_the_table_is_plausible(name: str) -> None:
    """A half-precision product is at least as fast as a float32 one, eight bits at least as fast as sixteen."""
    chip = CHIPS[name]
    assert chip.half >= chip.float32
    assert chip.int8 is not None
    assert chip.int8 >= 1.9 * chip.half
    assert 0.2 < chip.bandwidth < 10
    assert chip.source


@pytest.mark.parametrize("capability", GENERATIONS)
def test_generations_agree_with_what_is_asked_of_a_device(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend_gpu(monkeypatch, "a chip", *capability)
    generation = GENERATIONS[capability]
    assert supports_bf16("cuda") == generation.has_bfloat16
    assert has_fp8("cuda") == generation.has_fp8


def test_the_page_on_hardware_has_the_table() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "hardware.md"
    told = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| sm_")]
    words = {True: "yes", False: "no"}
    expected = [
        f"| sm_{major}{minor} | {each.chips} | {words[each.has_bfloat16]} | {words[each.has_fp8]} "
        f"| {each.shared_bytes // 1024} KiB |"
        for (major, minor), each in GENERATIONS.items()
    ]
    assert told == expected


def test_memory_is_held_to_the_control_groups_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    real = hardware.total_memory_bytes()
    monkeypatch.setattr(hardware.Path, "read_text", lambda *_, **__: "1000000\n")
    assert hardware.total_memory_bytes() == min(real, 1_000_000)


def test_no_driver_is_none_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "nvml", lambda: None)
    monkeypatch.setattr(hardware.Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    assert nvml_devices() == []
    assert driver_version() is None


@pytest.mark.gpu
def test_the_gpu_that_is_here_is_described() -> None:
    info = describe_device("cuda:0")
    assert info.kind == "cuda"
    assert info.capability is not None
    assert info.memory_bytes > 10**9


@pytest.mark.parametrize(
    ("built_for", "gpus", "why"),
    [
        (None, [], r"this torch \(.*\) is built without CUDA"),
        ("13.0", [], "no NVIDIA GPU with a working driver is found here"),
        ("13.0", [object()], "torch can't use the NVIDIA GPU that is here"),
    ],
)
def test_a_gpu_that_can_not_be_had_is_explained(
    monkeypatch: pytest.MonkeyPatch, built_for: str | None, gpus: list[object], why: str
) -> None:
    """It sent people to doctor, which said that all was ready."""
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "nvml_devices", lambda: gpus)
    with pytest.raises(DeviceError, match=f"cuda was asked for, and {why}.*model.device=cpu"):
        hardware.pick_device("cuda")

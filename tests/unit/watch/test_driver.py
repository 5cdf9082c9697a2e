"""Driver and torch build, read from what the tools print and the files say."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.watch import driver
from tunesmith.watch.driver import Driver, TorchBuild, find_driver, parse_torch_version, read_torch_build

HEADER = "| NVIDIA-SMI 570.86.15    Driver Version: 570.86.15    CUDA Version: 12.8   |\n"
LISTING = "GPU 0: NVIDIA H200 (UUID: GPU-1)\nGPU 1: NVIDIA H200 (UUID: GPU-2)\n"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without driver, tools or GPU; its files are in the folder that is returned."""
    monkeypatch.setattr(driver, "nvml", lambda: None)
    monkeypatch.setattr(driver, "driver_version", lambda: None)
    monkeypatch.setattr(driver.shutil, "which", lambda _: None)
    monkeypatch.setattr(driver, "_PROC", tmp_path / "version")
    monkeypatch.setattr(driver, "_PCI", tmp_path / "pci")
    return tmp_path


def _nvidia_smi(monkeypatch: pytest.MonkeyPatch, header: str, code: int = 0) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, code, LISTING if "-L" in command else header, "")

    monkeypatch.setattr(driver.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(driver.subprocess, "run", run)


def test_a_machine_without_a_gpu_has_no_problem(bare: Path) -> None:
    assert find_driver() == Driver()
    assert not find_driver().has_gpu


def test_nvidia_smi_is_read(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _nvidia_smi(monkeypatch, HEADER)
    found = find_driver()
    assert found == Driver("570.86.15", (12, 8), ("NVIDIA H200", "NVIDIA H200"))
    assert found.has_gpu


def test_nvidia_smi_that_fails_is_a_problem(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _nvidia_smi(monkeypatch, "Failed to initialize NVML: Driver/library version mismatch\n", code=18)
    found = find_driver()
    assert "Driver/library version mismatch" in (found.problem or "")
    assert found.mend is not None
    assert not found.has_gpu


def test_a_gpu_on_the_bus_without_a_driver_is_a_problem(bare: Path) -> None:
    for name, vendor, kind in (("0", "0x8086", "0x030000"), ("1", "0x10de", "0x030200")):
        device = bare / "pci" / name
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n", encoding="ascii")
        (device / "class").write_text(f"{kind}\n", encoding="ascii")
    assert find_driver().problem == "there is an NVIDIA GPU, and no driver"


def test_an_audio_function_of_nvidia_is_no_gpu(bare: Path) -> None:
    device = bare / "pci" / "0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x10de\n", encoding="ascii")
    (device / "class").write_text("0x040300\n", encoding="ascii")
    assert find_driver() == Driver()


def test_a_container_that_was_given_no_gpu_is_told_how(bare: Path) -> None:
    (bare / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86\n", encoding="ascii")
    if any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("there is a GPU here")
    assert find_driver().mend == "docker run --gpus all ..."


def test_torchs_build_is_read_without_importing_it() -> None:
    found = read_torch_build()
    assert found is not None
    assert found.version == torch.__version__
    assert (found.cuda is None) == (torch.version.cuda is None)


@pytest.mark.parametrize(
    ("text", "build"),
    [
        ("__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\n", TorchBuild("2.13.0+cu130", (13, 0))),
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n", TorchBuild("2.13.0+cpu", None)),
        ("from x import y\n", TorchBuild("unknown", None)),
    ],
)
def test_version_files(text: str, build: TorchBuild) -> None:
    assert parse_torch_version(text) == build

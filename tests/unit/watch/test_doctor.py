"""The check-up: each lack is found, has its level, and names what mends it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tunesmith.units import GB
from tunesmith.watch import doctor
from tunesmith.watch.doctor import Finding, check_up, has_errors
from tunesmith.watch.driver import Driver, TorchBuild

GPU = Driver("570.86", (12, 8), ("NVIDIA H200",))
RIGHT = [[5.0, 14.0], [14.0, 50.0]]
GOOD_PROBE = {"version": "2.13.0", "cpu_product": RIGHT, "devices": ["NVIDIA H200"], "cuda_product": [RIGHT]}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that pretends driver, torch build and probe, and returns the findings by name."""

    def examine(driver: Driver, build: TorchBuild | None, probe: dict[str, Any]) -> dict[str, Finding]:
        monkeypatch.setattr(doctor, "find_driver", lambda: driver)
        monkeypatch.setattr(doctor, "read_torch_build", lambda: build)
        monkeypatch.setattr(doctor, "_probe", lambda with_cuda: probe)
        return {finding.name: finding for finding in check_up()}

    return examine


def test_a_machine_that_is_ready_has_no_error(machine: Any) -> None:
    found = machine(Driver(), TorchBuild("2.13.0+cpu", None), {"version": "2.13.0+cpu", "cpu_product": RIGHT})
    assert not has_errors(list(found.values()))
    assert found["driver"].detail.startswith("no NVIDIA GPU: everything runs on the CPU (no driver answers, and no")
    assert found["torch build"].detail.startswith("2.13.0+cpu, without CUDA: for the CPU only")
    assert "cuda" not in found


def test_every_warning_and_error_names_its_mend(machine: Any) -> None:
    found = machine(GPU, None, {})
    assert all(f.mend for f in found.values() if f.level in ("warning", "error"))
    assert found["torch"].mend == "pip install torch"


def test_a_gpu_with_a_torch_without_cuda_is_an_error(machine: Any) -> None:
    found = machine(GPU, TorchBuild("2.13.0+cpu", None), {"version": "2.13.0+cpu", "cpu_product": RIGHT})
    assert found["torch build"].level == "error"
    assert "built without CUDA, and there is a GPU" in found["torch build"].detail


def test_a_torch_that_is_too_new_for_the_driver_is_an_error(machine: Any) -> None:
    found = machine(GPU, TorchBuild("2.13.0", (13, 0)), GOOD_PROBE)
    assert "needs CUDA 13.0, driver 570.86 runs CUDA up to 12.8" in found["torch build"].detail


def test_the_same_major_version_fits(machine: Any) -> None:
    found = machine(GPU, TorchBuild("2.13.0", (12, 9)), GOOD_PROBE)
    assert "torch build" not in found
    assert found["cuda"].level == "ok"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"devices": []}, "no device is visible"),
        ({"cuda_product": [[[0.0, 0.0], [0.0, 0.0]]]}, "a wrong result"),
        ({"devices": [], "error": "RuntimeError: CUDA unknown error"}, "CUDA unknown error"),
    ],
)
def test_a_gpu_that_torch_can_not_use_is_an_error(machine: Any, change: dict[str, Any], why: str) -> None:
    found = machine(GPU, TorchBuild("2.13.0", (12, 8)), {**GOOD_PROBE, **change})
    assert found["cuda"].level == "error"
    assert why in found["cuda"].detail


def test_hidden_devices_are_named(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = machine(GPU, TorchBuild("2.13.0", (12, 8)), {**GOOD_PROBE, "devices": []})
    assert "unset CUDA_VISIBLE_DEVICES" in (found["cuda"].mend or "")


def test_a_driver_problem_is_an_error_with_its_mend(machine: Any) -> None:
    found = machine(Driver(problem="there is an NVIDIA GPU, and no driver", mend="install it"), None, {})
    assert (found["driver"].level, found["driver"].mend) == ("error", "install it")


def test_a_torch_that_can_not_be_imported_is_an_error(machine: Any) -> None:
    found = machine(Driver(), TorchBuild("2.13.0", None), {"error": "ImportError: libgomp.so.1"})
    assert "libgomp" in found["torch"].detail
    assert found["torch"].level == "error"


@pytest.mark.parametrize(("driver", "level"), [(Driver(), "note"), (GPU, "error")])
def test_a_missing_compiler_matters_with_a_gpu(
    machine: Any, monkeypatch: pytest.MonkeyPatch, driver: Driver, level: str
) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda _: "/nonexistent")
    found = machine(driver, TorchBuild("2.13.0", (12, 8)), GOOD_PROBE)
    assert found["compiler"].level == found["headers"].level == level
    assert "-dev" in (found["headers"].mend or "")


def test_scarce_memory_disk_and_shared_memory_are_warned_of(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=2 * GB, available=GB))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * GB, total=GB // 16))
    found = machine(Driver(), TorchBuild("2.13.0", None), GOOD_PROBE)
    names = ["memory", "disk", "cache disk", *(["shared memory"] if Path("/dev/shm").is_dir() else [])]
    assert [found[name].level for name in names] == ["warning"] * len(names)


def test_a_full_disk_is_an_error(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000, total=GB))
    assert machine(Driver(), None, {})["disk"].level == "error"


def test_too_many_threads_are_warned_of(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    assert machine(Driver(), None, {})["cpu"].level == "warning"


def test_a_missing_package_is_an_error(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_REQUIRED", ("numpy", "no_such_package_here"))
    assert "no_such_package_here" in machine(Driver(), None, {})["packages"].detail


def test_the_real_probe_multiplies_in_a_process_of_its_own() -> None:
    facts = doctor._probe(with_cuda=False)
    assert facts["cpu_product"] == RIGHT
    assert "error" not in facts


def test_a_probe_that_crashes_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROBE", "import os; os.abort()")
    assert "ended with code" in doctor._probe(with_cuda=False)["error"]
    monkeypatch.setattr(doctor, "_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(doctor, "_PROBE_TIMEOUT_S", 0.5)
    assert "no answer within" in doctor._probe(with_cuda=False)["error"]

"""The meters and the check-up on a real GPU, against known allocations and a known load."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch

from tunesmith.hardware import describe_device, driver_version, nvml_devices, pick_device
from tunesmith.units import MIB
from tunesmith.watch.doctor import check_up, has_errors
from tunesmith.watch.gpu import GpuSampler
from tunesmith.watch.memory import LiveStorages, MemorySampler

pytestmark = pytest.mark.gpu


def test_the_allocators_peak_sees_a_block_that_came_and_went() -> None:
    with MemorySampler("cuda") as sampler:
        before = sampler.read().device_allocated_peak_bytes
        block = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")
        del block
        after = sampler.read()
    assert before is not None
    assert after.device_allocated_peak_bytes == before + 256 * MIB
    assert after.device_reserved_peak_bytes is not None
    assert after.device_reserved_peak_bytes >= 256 * MIB


def test_live_storages_agree_with_the_allocator() -> None:
    with LiveStorages(device_type="cuda") as live:
        tensor = torch.zeros(MIB, dtype=torch.float32, device="cuda")
        assert live.current_bytes == 4 * MIB
        del tensor
        assert live.current_bytes == 0


def test_the_gpu_is_named_by_driver_and_torch_alike() -> None:
    assert nvml_devices()
    assert driver_version()
    assert pick_device("auto").type == "cuda"
    assert describe_device("cuda").name == torch.cuda.get_device_name()


def test_the_sampler_sees_a_known_load() -> None:
    matrix = torch.randn(4096, 4096, device="cuda")
    with GpuSampler(period_s=0.1) as sampler:
        end = time.perf_counter() + 1.5
        while time.perf_counter() < end:
            matrix @ matrix
            torch.cuda.synchronize()
    summary = sampler.summaries()[0]
    assert summary.num_samples >= 5
    assert summary.mean_utilisation_ratio is not None
    assert summary.mean_utilisation_ratio > 0.3
    assert summary.peak_memory_used_bytes is not None
    assert summary.peak_memory_used_bytes > 64 * MIB


def test_the_check_up_and_the_fingerprint_start_no_cuda() -> None:
    program = (
        "import json, torch; from tunesmith.rundir.environment import environment_fingerprint;"
        "from tunesmith.watch.doctor import check_up; facts = environment_fingerprint(); check_up();"
        "print(json.dumps([torch.cuda.is_initialized(), facts['gpus']]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    started, gpus = json.loads(done.stdout.splitlines()[-1])
    assert not started
    assert gpus[0]["memory_bytes"] > 0
    assert gpus[0]["sm_clock_mhz"] is None or gpus[0]["sm_clock_mhz"] > 0


def test_this_machine_is_ready() -> None:
    findings = check_up()
    assert not has_errors(findings), [f for f in findings if f.level == "error"]
    assert "cuda" in {f.name for f in findings}


def test_doctor_finds_a_gpu_that_is_hidden_from_torch(
    tunesmith_cli: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = tunesmith_cli("doctor", env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1
    assert "unset CUDA_VISIBLE_DEVICES" in done.stderr

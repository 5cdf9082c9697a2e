"""Expandable segments on a GPU and a heap that is kept on a CPU, unless the user or a started CUDA says else."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from tunesmith.rundir.environment import (
    ALLOCATOR_VARIABLES,
    HOST_ALLOCATOR,
    HOST_ALLOCATOR_VARIABLES,
    environment_fingerprint,
)
from tunesmith.train.allocator import KEPT_BYTES, SETTINGS, prepare_allocator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="expandable segments are Linux's")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in list(HOST_ALLOCATOR):
        monkeypatch.delitem(HOST_ALLOCATOR, name)
    for name in (*ALLOCATOR_VARIABLES, *HOST_ALLOCATOR_VARIABLES):
        monkeypatch.setenv(name, "x")  # so that it is put back afterwards
        monkeypatch.delenv(name)


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:1"])
def test_it_is_set_and_recorded(device: str) -> None:
    prepare_allocator(device)
    assert environment_fingerprint()["cuda_allocator"] == {"PYTORCH_ALLOC_CONF": SETTINGS}


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_the_users_settings_win_by_either_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:64")
    prepare_allocator("cuda")
    assert environment_fingerprint()["cuda_allocator"] == {name: "max_split_size_mb:64"}


def test_a_cpu_and_a_started_cuda_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_allocator("cpu")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    prepare_allocator("cuda")
    assert not os.environ.keys() & set(ALLOCATOR_VARIABLES)
    assert environment_fingerprint()["cuda_allocator"] == {}


def test_torch_takes_the_settings_when_cuda_starts() -> None:
    """The allocator must know the name of the variable and of the setting; a wrong one would only be a warning."""
    torch._C._accelerator_setAllocatorSettings(SETTINGS)


FAULTS = """
import resource, sys
import torch
from tunesmith.rundir.environment import environment_fingerprint
from tunesmith.train.allocator import prepare_allocator

torch.set_num_threads(1)
if sys.argv[1] == "kept":
    prepare_allocator("cpu")
first = torch.empty(1 << 22).fill_(1.0)
del first
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.empty(1 << 22).fill_(1.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(kind: str) -> int:
    """Pages that the kernel had to give out for twenty tensors of 16 MiB, one after the other."""
    done = subprocess.run([sys.executable, "-c", FAULTS, kind], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_on_a_cpu_memory_is_found_where_it_was_left() -> None:
    """An aligned tensor may miss the hole of the last by a few bytes, so the first few still take new pages."""
    assert _faults("kept") < _faults("plain") / 2


def test_what_the_c_library_was_told_is_recorded() -> None:
    prepare_allocator("cpu")
    kept = environment_fingerprint()["host_allocator"]
    assert kept == {"mmap_threshold_bytes": KEPT_BYTES, "trim_threshold_bytes": KEPT_BYTES}


@pytest.mark.parametrize("name", HOST_ALLOCATOR_VARIABLES)
def test_the_users_own_heap_is_left_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "65536")
    prepare_allocator("cpu")
    assert environment_fingerprint()["host_allocator"] == {name: "65536"}


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    prepare_allocator("cpu")
    assert environment_fingerprint()["host_allocator"] == {}

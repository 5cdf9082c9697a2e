"""Expandable segments on a GPU and a heap that is kept on a CPU, unless the user or a started CUDA says else."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable
from types import SimpleNamespace

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
    # This process is told nothing: tests of memory may come after this one.
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: SimpleNamespace(mallopt=lambda *_: 1))
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


HELD = """
import sys
import torch
from tunesmith.train.allocator import prepare_allocator
from tunesmith.watch.memory import resident_bytes

torch.set_num_threads(1)
if sys.argv[1] == "kept":
    prepare_allocator("cpu")
before = resident_bytes()
tensor = torch.empty(1 << 24).fill_(1.0)
del tensor
print(resident_bytes() - before)
"""


def test_on_a_cpu_memory_is_kept_for_the_next_step(torch_forks: Callable[..., str]) -> None:
    """What a process still holds of a tensor of 64 MiB that is gone."""
    assert int(torch_forks(HELD, "plain")) < 16 << 20
    assert int(torch_forks(HELD, "kept")) > 48 << 20


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

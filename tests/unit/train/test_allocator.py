"""Expandable segments, unless the user or a started CUDA says else."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from tunesmith.rundir.environment import ALLOCATOR_VARIABLES, environment_fingerprint
from tunesmith.train.allocator import SETTINGS, prepare_allocator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="expandable segments are Linux's")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    for name in ALLOCATOR_VARIABLES:
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

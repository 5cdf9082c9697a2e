"""Launches are taken down without being made, and what is compiled ahead is what a launch looks for."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.kernels import warm_up
from tunesmith.kernels.nf4 import use_kernel
from tunesmith.kernels.rms_norm import rms_norm, rms_norm_backward
from tunesmith.kernels.warm_up import Launch, compile_all, compiling_for, recorded, taken_down

pytest.importorskip("triton")
CHIP = (9, 0)
EPS = 1e-5


@pytest.fixture(autouse=True)
def _compiled() -> None:
    from triton.runtime.jit import JITFunction

    from tunesmith.kernels.rms_norm_triton import _normalise_kernel

    if not isinstance(_normalise_kernel, JITFunction):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of Triton's own, and no kernel held by the process before or after."""
    from tunesmith.kernels.rms_norm_triton import _backward_kernel, _normalise_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel in (_backward_kernel, _normalise_kernel):
        kernel.device_caches.clear()
    yield tmp_path
    for kernel in (_backward_kernel, _normalise_kernel):
        kernel.device_caches.clear()


def _there_and_back(rows: int, device: str = "meta", width: int = 96) -> None:
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(width, dtype=torch.bfloat16, device=device)
    _, rstd = rms_norm(x, weight, EPS)
    rms_norm_backward(x, x, weight, rstd, x, False)


def test_launches_are_taken_down_once() -> None:
    launches = recorded(lambda: [_there_and_back(rows) for rows in (32, 64)])
    assert [launch.name for launch in launches] == ["_normalise_kernel", "_backward_kernel"]
    assert not use_kernel(torch.device("meta"))


def test_widths_and_dtypes_are_told_apart() -> None:
    launches = recorded(lambda: [_there_and_back(32, width=width) for width in (96, 48)])
    assert len(launches) == 4
    assert len({launch.key for launch in launches}) == 4


def test_an_error_ends_the_computation_and_keeps_what_was_found() -> None:
    def fails() -> None:
        _there_and_back(32)
        torch.empty((), device="meta").item()

    assert len(recorded(fails)) == 2


def test_a_launch_with_real_tensors_finds_what_was_compiled_ahead(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs
    from triton.runtime.jit import JITFunction

    from tunesmith.kernels import rms_norm_triton

    done = compile_all(recorded(lambda: _there_and_back(32)), CHIP, processes=2)
    assert (done.kernels, done.failed) == (2, ())
    assert list(cache.rglob("*.cubin"))
    hits: list[bool] = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **facts: hits.append(facts["cache_hit"]))
    x, weight = torch.zeros(48, 96, dtype=torch.bfloat16), torch.zeros(96, dtype=torch.bfloat16)
    with taken_down() as launches:
        rms_norm_triton._normalise(x, weight, torch.zeros(48), EPS, again=False)
    with compiling_for(CHIP):
        for launch in launches:
            JITFunction.run(launch.kernel, *launch.arguments, grid=(1,), warmup=True, **launch.options)
    assert hits == [True]


def test_a_kernel_that_does_not_compile_is_named(cache: Path) -> None:
    (launch, _) = recorded(lambda: _there_and_back(32))
    broken = Launch(launch.kernel, launch.arguments, {**launch.options, "COLUMNS": 100})
    done: Any = compile_all([broken], CHIP, processes=1)
    assert done.failed == ("_normalise_kernel",)


def test_a_process_that_is_killed_costs_its_kernel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a machine without memory: all others are compiled, and nobody waits for it."""
    first, second = recorded(lambda: _there_and_back(32))
    compiles = warm_up._compiles

    def killed(launch: Launch) -> bool:
        if launch is first:
            os.kill(os.getpid(), signal.SIGKILL)
        return compiles(launch)

    monkeypatch.setattr(warm_up, "_compiles", killed)
    assert compile_all([first, second], CHIP, processes=2).failed == (first.name,)
    assert len(list(cache.rglob("*.cubin"))) == 1

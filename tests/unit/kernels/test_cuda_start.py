"""CUDA's early start: for GPUs only, by the driver's own calls, and never an error."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tunesmith.kernels import cuda_start
from tunesmith.kernels.cuda_start import start_cuda


class _Driver:
    """Takes the calls down and answers each with `code`."""

    def __init__(self, code: int = 0) -> None:
        self.calls: list[tuple[str, Any]] = []
        self._code = code

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append((name, arguments[-1]))
            return self._code

        return call


def test_the_context_of_the_recipes_device_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = _Driver()
    monkeypatch.setenv("CUDA_MODULE_LOADING", "EAGER")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    started = start_cuda("cuda:3")
    assert started is not None
    started.wait()
    names = [name for name, _ in driver.calls]
    assert names == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]
    assert driver.calls[1][1] == 3


def test_a_driver_that_refuses_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = _Driver(code=100)
    monkeypatch.setenv("CUDA_MODULE_LOADING", "EAGER")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    started = start_cuda("auto")
    assert started is not None
    started.wait()
    assert [name for name, _ in driver.calls] == ["cuInit"]


@pytest.mark.parametrize("device", ["cpu", "tpu", "cuda:x"])
def test_other_devices_start_nothing(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("the driver was opened"))
    assert start_cuda(device) is None


def test_no_driver_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert start_cuda("auto") is None


def test_what_a_first_step_imports_has_no_compiler_in_it(torch_forks: Callable[..., str]) -> None:
    pytest.importorskip("triton")
    code = (
        "import sys, tunesmith.train.run, tunesmith.verify.certificate\n"
        "from tunesmith.model.uncompiled import import_kernels\n"
        "import_kernels()\n"
        "import torch\n"
        "from tunesmith.train.run import SLOW_IMPORTS\n"
        "print([name for name in SLOW_IMPORTS if name in sys.modules], 'torch.nn.attention.varlen' in sys.modules,\n"
        "      '_dynamo' in vars(torch))\n"
    )
    assert torch_forks(code).strip() == "[] True False"


def test_importing_it_is_quick() -> None:
    code = "import sys, tunesmith.kernels.cuda_start, tunesmith.watch.start_up; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert cuda_start.__doc__

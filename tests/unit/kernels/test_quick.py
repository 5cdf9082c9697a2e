"""Launches that are remembered go where Triton would have sent them; what Triton compiles anew for is told apart."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tunesmith.kernels import quick as module
from tunesmith.kernels.quick import quick


class Compiled:
    """What a kernel compiled to: takes down with what it is launched."""

    def __init__(self, found: list[Any]) -> None:
        self.found = found

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *args, stream: self.found.append((grid, args, stream))


class Kernel:
    """A kernel of two tensors, a number and two constants."""

    arg_names = ("x", "y", "num", "WIDTH", "FLAG")

    def __init__(self) -> None:
        self.through_triton: list[Any] = []
        self.remembered: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*args: Any, **constants: Any) -> Compiled:
            self.through_triton.append((grid, args, constants))
            return Compiled(self.remembered)

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A kernel that is launched as on a GPU."""
    monkeypatch.setattr(module, "_has_handles", lambda _: True)
    monkeypatch.setattr(module, "_stream", lambda _: 7)
    return Kernel()


def launch(kernel: Kernel, x: torch.Tensor, num: Any = 32, **changed: Any) -> Any:
    options: dict[str, Any] = {"num_warps": 4, "FLAG": False, "WIDTH": 64, **changed}
    return quick(kernel)[(3, 2)](x, x, num, **options)


def test_the_second_launch_calls_what_the_first_compiled(kernel: Kernel) -> None:
    x, other = torch.zeros(64), torch.zeros(64)
    first = launch(kernel, x)
    assert launch(kernel, other, 64) is first
    assert len(kernel.through_triton) == 1
    grid, args, stream = kernel.remembered[0]
    assert (grid, stream) == ((3, 2, 1), 7)
    assert args[0] is other
    assert args[2:] == (64, 64, False)  # the constants in the kernel's order, options not among them


def test_what_triton_specialises_on_is_told_apart(kernel: Kernel) -> None:
    x = torch.zeros(64)
    launch(kernel, x)
    different: list[tuple[torch.Tensor, Any, dict[str, Any]]] = [
        (x.half(), 32, {}),
        (x[1:], 32, {}),
        (x, 33, {}),
        (x, 1, {}),
        (x, 2**35, {}),
        (x, None, {}),
        (x, 0.5, {}),
        (x, 32, {"WIDTH": 128}),
        (x, 32, {"FLAG": True}),
        (x, 32, {"num_warps": 8}),
    ]
    for tensor, num, changed in different:
        launch(kernel, tensor, num, **changed)
    assert len(kernel.through_triton) == 1 + len(different)
    assert not kernel.remembered
    for tensor, num, changed in different:
        launch(kernel, tensor, num, **changed)
    assert len(kernel.remembered) == len(different)


def test_what_is_not_known_goes_through_triton_every_time(kernel: Kernel) -> None:
    x = torch.zeros(64)
    for _ in range(2):
        launch(kernel, x, num=(1, 2))
        launch(kernel, x, WIDTH=torch.zeros(1))
        quick(kernel)[(1,)](x, x, 3, WIDTH=64)  # a constant is left to its default
    assert len(kernel.through_triton) == 6


def test_the_interpreter_and_the_meta_device_have_the_kernel_itself() -> None:
    kernel = Kernel()
    for device in ("cpu", "meta", "cpu"):
        launch(kernel, torch.zeros(64, device=device))
    assert len(kernel.through_triton) == 3
    assert quick(kernel) is quick(kernel)


def test_real_kernels_are_called_with_all_their_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own classes: the first launch compiles, without a GPU; later ones must have every argument in order."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from tunesmith.kernels import swiglu_triton
    from tunesmith.kernels.swiglu_triton import swiglu_operator

    launched: list[tuple[Any, ...]] = []

    class Utils:
        def load_binary(self, *_: Any) -> tuple[None, int, int, int, int]:
            return None, 1, 32, 0, 1024  # no module: nothing to unload

        def get_device_properties(self, _: int) -> dict[str, int]:
            return {"max_shared_mem": 2**18}

    class Driver:
        """Launches nothing."""

        utils = Utils()

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def launcher_cls(self, *_: Any) -> Callable[..., None]:
            return lambda *given: launched.append(given)

    if not hasattr(swiglu_triton._forward_kernel, "device_caches"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    monkeypatch.setattr(module, "_has_handles", lambda _: True)
    monkeypatch.setattr(module, "_stream", lambda _: 0)
    monkeypatch.setattr(module, "_quick", {})
    monkeypatch.setattr(driver, "_active", Driver())
    kernel = swiglu_triton._forward_kernel
    monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    source = torch.zeros(4, 512, dtype=torch.bfloat16)
    for _ in range(3):
        swiglu_operator._init_fn(source)
    names = kernel.arg_names
    through_triton, *remembered = [given[-len(names) :] for given in launched]
    assert len(remembered) == 2
    for given in remembered:
        assert given[0] is source
        assert given[2:] == through_triton[2:]

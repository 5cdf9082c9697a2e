"""Launches that are remembered go where Triton would have sent them; what Triton compiles anew for is told apart."""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
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
    constexprs = (3, 4)

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
        (x, 2**63, {}),
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
        for width in (64, 128):  # taken for a number, which tells 64 and 128 not apart
            quick(kernel)[(1,)](x, x, 3, width, FLAG=True)
    assert len(kernel.through_triton) == 10


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


class DriverOfNothing:
    """As much of a driver as finding a kernel needs."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def any_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, list[Any]]]:
    """Triton's own kernel and binder, nothing of which is compiled; and what is launched, a tuple each."""
    triton = pytest.importorskip("triton")
    import triton.language as tl
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

    launched: list[Any] = []

    class Nothing(CompiledKernel):  # type: ignore[misc, unused-ignore]
        """A kernel that is loaded already; a launch is taken down."""

        def __init__(self, src: Any, target: Any, options: Any, **_: Any) -> None:
            self.src, self.name, self.module, self.function = src, "nothing", "loaded", object()
            self.packed_metadata, self.metadata, self._module_pid = object(), None, None
            self.metadata_group, self.hash = {}, ""
            self._run = lambda *given: launched.append(given)

    def drawn(x, y, z, num, loose, unaligned, eps, WIDTH: tl.constexpr, FLAG: tl.constexpr) -> None:  # type: ignore[no-untyped-def, name-defined, unused-ignore] # fmt: skip
        pass

    kernel = triton.jit(do_not_specialize=["loose"], do_not_specialize_on_alignment=["unaligned"])(drawn)
    if not hasattr(kernel, "device_caches"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")

    def binder() -> Any:
        found = kernel.create_binder()
        kernel.compile = Nothing
        return found

    kernel.device_caches = defaultdict(binder)
    monkeypatch.setattr(module, "_has_handles", lambda _: True)
    monkeypatch.setattr(module, "_stream", lambda _: 0)
    monkeypatch.setattr(module, "_quick", {})
    monkeypatch.setattr(driver, "_active", DriverOfNothing())
    yield kernel, launched


def test_any_launch_is_the_one_that_triton_makes(any_kernel: tuple[Any, list[Any]]) -> None:
    """Drawn arguments: the same compiled kernel, grid, stream and arguments as by Triton's own binder."""
    kernel, launched = any_kernel
    base = torch.zeros(64)
    tensors = [base, base[1:], base[4:], base.half(), base.half()[1:], base.to(torch.int8)[16:], base[:0], None]
    numbers = [0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 1, 2**31, -(2**31) - 1, 2**31 + 16, 2**62, 2**63, 2**63 + 1]
    others = [True, False, None, 0.5, 1.0, float("inf"), base, base[1:]]
    options: list[dict[str, Any]] = [{}, {"num_warps": 8}, {"num_stages": 2}, {"maxnreg": 96}, {"launch_pdl": True}]
    rounding = {"enable_fp_fusion": False}
    rng = random.Random(0)
    through_triton = 0
    for _ in range(1500):
        args: list[Any] = [base, base, base, 32, 3, 3, 0.5]
        for place in rng.sample(range(7), 2):  # few at a time, so that nearly all come again
            pool = tensors[:-1] if place == 0 else tensors if place < 3 else others if place == 6 else numbers + others
            args[place] = rng.choice(pool)
        constants = {"WIDTH": rng.choice([64, 128]), "FLAG": rng.choice([True, False]), **rounding}
        constants |= rng.choice(options)
        grid = rng.choice([(3,), (3, 2), (1, 2, 3)])
        known = len(quick(kernel)._known)
        gave = quick(kernel)[grid](*args, **constants)
        through_triton += len(quick(kernel)._known) != known
        assert kernel[grid](*args, **constants) is gave
        ours, theirs = launched[-2:]
        assert ours[:6] == theirs[:6]
        # Grid, stream, kernel and its facts; then what hooks are told, and the hooks; then the kernel's arguments.
        assert len(ours) == len(theirs) == 9 + len(kernel.arg_names)
        assert all(a is b for a, b in zip(ours[9:], theirs[9:], strict=True))
    assert through_triton < 1000


def test_launches_of_many_threads_are_each_their_own(any_kernel: tuple[Any, list[Any]]) -> None:
    kernel, launched = any_kernel
    base = torch.zeros(64)

    def work(number: int) -> None:
        constants = {"WIDTH": 64 * (1 + number % 2), "FLAG": False, "enable_fp_fusion": False}
        for turn in range(50):
            quick(kernel)[(number + 1,)](base, base, base, turn, 2, 3, 0.5, **constants)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(launched) == 200
    for given in launched:
        assert given[9 + kernel.arg_names.index("WIDTH")] == 64 * (1 + (given[0] - 1) % 2)


def test_whoever_listens_is_told_of_every_launch(
    any_kernel: tuple[Any, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A profiler's hooks: with one in the chain Triton's own call makes the launch and its record; without, nobody."""
    from triton import knobs

    kernel, launched = any_kernel
    base = torch.zeros(64)

    def told() -> tuple[Any, ...]:
        constants = {"WIDTH": 64, "FLAG": False, "enable_fp_fusion": False}
        quick(kernel)[(5,)](base, base, base, 3, 2, 3, 0.5, **constants)
        found: tuple[Any, ...] = launched[-1]
        return found

    through_triton, alone = told(), told()
    assert alone[6:9] == (None, None, None)
    assert alone[:6] == through_triton[:6]
    assert all(a is b for a, b in zip(alone[9:], through_triton[9:], strict=True))
    runtime = knobs.runtime
    if not hasattr(runtime.launch_enter_hook, "calls"):
        pytest.skip("this Triton has one hook, not a chain of them")
    monkeypatch.setattr(runtime.launch_exit_hook, "calls", [lambda record: None])
    heard = told()
    assert heard[6] is not None and heard[7] is runtime.launch_enter_hook and heard[8] is runtime.launch_exit_hook

"""Triton kernels compiled before they are launched, many at a time, in processes that never touch a GPU.

`recorded` runs a computation on the meta device and takes down every launch instead of making it: the computation
itself says which specialisations it needs, so no list of them can go stale. `compile_all` compiles them into Triton's
cache on disk, where a launch with the same dtypes, widths and alignment finds them. What is left to the process that
launches is to load them.
"""

# Triton's classes have no types.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.kernels.forks import done_in_forks
from tunesmith.kernels.nf4 import kernels_on

_log = logging.getLogger(__name__)
_ALIGNMENT = 16


@dataclass(frozen=True)
class Launch:
    """A launch that was taken down: Triton's kernel, its arguments (tensors on the meta device), its options."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's own name."""
        return str(self.kernel.__name__)

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for launches that Triton specialises alike; it may tell some apart that Triton does not."""
        parameters = getattr(self.kernel, "params", ())[: len(self.arguments)]
        loose = {parameter.num for parameter in parameters if parameter.do_not_specialize}
        kinds = (_kind(value, place not in loose) for place, value in enumerate(self.arguments))
        return (id(self.kernel), *kinds, *((name, _exact(value)) for name, value in sorted(self.options.items())))


@dataclass(frozen=True)
class WarmUp:
    """What `compile_all` did. failed: names of kernels that did not compile."""

    kernels: int
    processes: int
    duration_s: float
    failed: tuple[str, ...] = ()


def recorded(computation: Callable[[], object]) -> list[Launch]:
    """The launches of a computation on the meta device, each specialisation once, in order.

    What the computation raises ends it, quietly: what it launched until then is worth compiling.
    """
    with taken_down() as found:
        if not _ended(computation, _without_compiler()):
            found.clear()
            _ended(computation, contextlib.nullcontext())
    return list({launch.key: launch for launch in found}.values())


def _ended(computation: Callable[[], object], surroundings: contextlib.AbstractContextManager[None]) -> bool:
    """Whether the computation went to its end."""
    try:
        with surroundings, kernels_on("meta"), _Implementations():
            computation()
    except Exception:
        _log.debug("taking down launches ended early", exc_info=True)
        return False
    return True


@contextmanager
def _without_compiler() -> Iterator[None]:
    """On the meta device torch's operators ask its compiler to leave them alone. Nothing is compiled, so nobody asks.

    What asks for more than that fails: `recorded` then begins again, with the compiler.
    """
    if "torch._dynamo" in sys.modules:
        yield
        return
    stand_in: Any = ModuleType("torch._dynamo")
    stand_in.disable = _as_it_is
    sys.modules["torch._dynamo"] = vars(torch)["_dynamo"] = stand_in
    try:
        yield
    finally:
        del sys.modules["torch._dynamo"], vars(torch)["_dynamo"]


def _as_it_is(function: Any, *_: Any, **__: Any) -> Any:
    return function


@contextmanager
def taken_down() -> Iterator[list[Launch]]:
    """Launches are put on this list, and not made."""
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []

    def take_down(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(Launch(kernel, args, options))

    run = JITFunction.run
    JITFunction.run = take_down
    try:
        yield found
    finally:
        JITFunction.run = run


def compile_all(launches: Sequence[Launch], capability: tuple[int, int], processes: int) -> WarmUp:
    """Compile for GPUs of this capability into Triton's cache. Forks: call it where nothing else runs."""
    began = time.perf_counter()
    count = len(launches)
    processes = max(1, min(processes, count))
    with compiling_for(capability):
        _build_driver()
        if processes == 1:
            done = {index for index in range(count) if _compiles(launches[index])}
        else:
            done = done_in_forks(lambda index: _compiles(launches[index]), count, processes)
    names = tuple(launches[index].name for index in range(count) if index not in done)
    return WarmUp(count, processes, time.perf_counter() - began, names)


def _kind(value: Any, specialised: bool = True) -> Any:
    """What Triton looks at in an argument that is no constant. specialised: False: at nothing but its type."""
    if isinstance(value, Tensor):
        return value.dtype, specialised and value.data_ptr() % _ALIGNMENT == 0
    if isinstance(value, int) and not isinstance(value, bool):
        is_narrow = -(2**31) <= value < 2**31
        return ("int", value == 1, value % _ALIGNMENT == 0, is_narrow) if specialised else ("int", is_narrow)
    return type(value)


def _exact(value: Any) -> Any:
    return _kind(value) if isinstance(value, Tensor) else value


def _compiles(launch: Launch) -> bool:
    """Compile for a launch. Returns whether that could be done; where not, the launch itself will say why."""
    try:
        compiled = launch.kernel.run(*launch.arguments, grid=(1,), warmup=True, **launch.options)
    except Exception:
        _log.debug("%s did not compile ahead", launch.name, exc_info=True)
        return False
    _build_launcher(compiled)
    return True


def _build_driver() -> None:
    """Triton's C module, which it compiles once; without CUDA's library it can't be."""
    with contextlib.suppress(Exception):
        from triton.backends.nvidia.driver import CudaUtils

        CudaUtils()


def _build_launcher(compiled: Any) -> None:
    """Triton up to 3.6 compiles a C function for each signature, and keeps it in its cache too."""
    with contextlib.suppress(Exception):
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(compiled.src, compiled.metadata)


class _Implementations(TorchDispatchMode):
    """Our operators run their own code on the meta device, not the description of their outputs."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch need not keep its compiler away: telling it imports the compiler, which is seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "tunesmith":
            from torch._library.custom_ops import OPDEFS

            return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def compiling_for(capability: tuple[int, int]) -> Iterator[None]:
    """Triton compiles for this GPU, and asks no driver."""
    from triton.runtime.driver import driver

    active = driver._active
    driver.set_active(_Target(capability))
    try:
        yield
    finally:
        driver._active = active


class _Target:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        major, minor = self.capability
        return GPUTarget("cuda", 10 * major + minor, 32)

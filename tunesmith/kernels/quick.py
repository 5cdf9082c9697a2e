"""Launches of Triton kernels past Triton's binder, for passes that launch hundreds of them one by one.

Triton looks at every argument of every launch, and turns options and constants into text, before it finds the compiled
kernel: 15 to 55 us on the host, where a kernel of a decoding step runs for 2 to 10. Nearly always it finds the one that
it found in the layer before. So a launch is known here by what Triton specialises on (dtypes, whether pointers are
aligned, whether numbers are 1 or multiples of 16, constants, options): the first of its kind goes through Triton, later
ones call what that compiled.

    quick(kernel)[grid](x, y, num_rows, WIDTH=width, num_warps=4)        in place of kernel[grid](...)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 16
_NARROW, _SIGNED = 2**31, 2**63
_PLAIN = (int, float, str, type(None))
_quick: dict[int, Quick] = {}


class Known:
    """What a kernel compiled to for one kind of launch, and the constants that come behind the arguments.

    Triton's own call of it asks after its handles twice and makes a closure and a record for each launch, for hooks
    that nobody has set; and then calls both chains of them. Where nobody listens, the launcher itself is called.
    """

    __slots__ = ("_function", "_packed", "_run", "compiled", "constants")

    def __init__(self, compiled: Any, constants: tuple[Any, ...]) -> None:
        self.compiled, self.constants = compiled, constants
        # Triton has loaded it: it was launched just now.
        self._run = getattr(compiled, "run", None)
        self._function = getattr(compiled, "function", None)
        self._packed = getattr(compiled, "packed_metadata", None)

    def launch(self, grid: tuple[int, ...], stream: int, args: tuple[Any, ...]) -> None:
        """Launch in so many programs on this stream."""
        first, second, third = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        if self._run is None or self._function is None or _somebody_listens():
            self.compiled[first, second, third](*args, *self.constants, stream=stream)
            return
        nobody = (None, None, None)  # the launch's record, and who is told before and after
        self._run(first, second, third, stream, self._function, self._packed, *nobody, *args, *self.constants)


class Quick:
    """A kernel of Triton's whose launches are remembered. For the interpreter and the meta device it is the kernel.

    All that is no constant comes by position, a tensor first.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._known: dict[tuple[Any, ...], Known] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """Launches in so many programs; gives the compiled kernel, or None where nothing is compiled."""

        def launch(*args: Any, **constants: Any) -> Any:
            device: torch.device = args[0].device
            kinds = _kinds(args) if _has_handles(device) else None
            if kinds is None:
                return self.kernel[grid](*args, **constants)
            index = device.index
            key = (index, *kinds, *constants.items())
            found = self._known.get(key)
            if found is None:
                compiled = self.kernel[grid](*args, **constants)
                names = self.kernel.arg_names[len(args) :]
                if compiled is not None and self._is_known(len(args), names, constants):
                    self._known[key] = Known(compiled, tuple(constants[name] for name in names))
                return compiled
            found.launch(grid, _stream(index), args)
            return found.compiled

        return launch

    def _is_known(self, num_args: int, names: Sequence[str], constants: Mapping[str, Any]) -> bool:
        """Whether a launch's key says all: every constant comes by its name, none is left out, and each is plain."""
        is_named = all(place >= num_args for place in self.kernel.constexprs) and all(
            name in constants for name in names
        )
        return is_named and all(isinstance(value, _PLAIN) for value in constants.values())


def quick(kernel: Any) -> Quick:
    """The one `Quick` of a kernel."""
    found = _quick.get(id(kernel))
    if found is None:
        found = _quick[id(kernel)] = Quick(kernel)
    return found


def _kinds(args: Sequence[Any]) -> list[Any] | None:
    """What Triton looks at in these; None for what is not known here."""
    kinds: list[Any] = []
    add = kinds.append
    for value in args:
        if isinstance(value, Tensor):
            add(value.dtype)
            add(not value.data_ptr() % _ALIGNMENT)
        elif type(value) is int:
            add(_kind_of(value))
        elif value is None or type(value) is float:
            add(type(value))
        else:
            return None
    return kinds


@lru_cache(maxsize=4096)
def _kind_of(number: int) -> tuple[bool, ...]:
    return number == 1, number % _ALIGNMENT == 0, -_NARROW <= number < _NARROW, number < _SIGNED


def _has_handles(device: torch.device) -> bool:
    """Whether compiled kernels are launched there."""
    return device.type == "cuda"


def _stream(device_index: int) -> int:
    """The stream that work of this thread goes to."""
    stream: int = torch._C._cuda_getCurrentRawStream(device_index)
    return stream


def _somebody_listens() -> bool:
    """Whether a profiler is to be told of launches: what Triton's hooks are for."""
    runtime = _triton_runtime()
    return runtime is None or bool(_calls(runtime.launch_enter_hook) or _calls(runtime.launch_exit_hook))


def _calls(hook: Any) -> Any:
    """Who is called by a hook: a chain of some, or in older versions one or None."""
    return getattr(hook, "calls", hook)


@cache
def _triton_runtime() -> Any:
    """Triton's switches; None for a version that has them elsewhere."""
    try:
        from triton import knobs
    except ImportError:
        return None
    found = getattr(knobs, "runtime", None)
    return found if hasattr(found, "launch_enter_hook") and hasattr(found, "launch_exit_hook") else None

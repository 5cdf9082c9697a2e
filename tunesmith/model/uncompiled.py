"""Parts of torch that import its whole compiler, or sympy, at their first call: the same without."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor


def spare_compiler(*functions: Callable[..., Any]) -> None:
    """Functions that torch keeps out of compiled code (`torch._disable_dynamo`) no longer import the compiler for that.

    The import takes a second or more, in a process that compiles nothing. Torch notes on the function behind each what
    to call instead of it, and here that is the function itself; what has its note already keeps it.
    """
    for function in functions:
        behind = getattr(function, "__wrapped__", None)
        if behind is not None and not hasattr(behind, "__dynamo_disable"):
            setattr(behind, "__dynamo_disable", behind)


def import_uncompiled(name: str) -> ModuleType:
    """Import a module of torch that tells the compiler, at its end, which operators it may not take apart.

    Telling imports the compiler, sympy and torch.distributed: seconds. Here the compiler is told nothing; nor would it
    take such an operator apart, unless somebody compiles code of their own around it in this process.
    """
    if name in sys.modules or "torch._dynamo" in sys.modules:
        return importlib.import_module(name)
    stand_in = SimpleNamespace(disallow_in_graph=_as_it_is)
    vars(torch)["_dynamo"] = stand_in
    try:
        return importlib.import_module(name)
    finally:
        if vars(torch).get("_dynamo") is stand_in:
            del vars(torch)["_dynamo"]


def _as_it_is(function: Any) -> Any:
    return function


def decide_determinism(wanted: bool) -> None:
    """`torch.use_deterministic_algorithms(wanted)`.

    torch imports its compiler there (one to four seconds) to tell it, too; here it is told only where it has come in
    already. What somebody compiles later in such a process follows the compiler's own switch.
    """
    if "torch._inductor" in sys.modules:
        torch.use_deterministic_algorithms(wanted)
    else:
        torch._C._set_deterministic_algorithms(wanted, warn_only=False)


def spare_operators() -> None:
    """No operator written in Python that there is now (ours, and FlashAttention's) imports the compiler when called."""
    from torch._library.custom_ops import OPDEFS

    for operator in list(OPDEFS.values()):
        spare_compiler(*getattr(operator, "_backend_fns", {}).values())


def import_kernels() -> None:
    """Import all that a first step on a GPU would: Triton, our kernels, FlashAttention; none with the compiler."""
    from tunesmith import kernels

    for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
        if module.name.endswith("_triton"):
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
    with contextlib.suppress(ImportError):
        import_uncompiled("torch.nn.attention.varlen")
    spare_operators()


def gradients(out: Tensor, inputs: Sequence[Tensor], grad_out: Tensor) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad(out, inputs, grad_out, allow_unused=True)`.

    torch compares the shapes of `out` and `grad_out` by its symbolic shapes, which import sympy; a scalar's gradient
    it makes itself. The caller sees to it that both have one shape.
    """
    return torch.autograd.grad(cast(Tensor, _Seed.apply(out, grad_out)), inputs, allow_unused=True)


class _Seed(torch.autograd.Function):
    """A scalar whose gradient to `out` is `grad_out`."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, grad_out: Tensor) -> Tensor:
        ctx.grad_out = grad_out
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.grad_out, None

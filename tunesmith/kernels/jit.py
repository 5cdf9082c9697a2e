"""`triton.jit`, with the key by which Triton finds a compiled kernel on disk made at once. Imported where Triton is.

Triton makes the key of a kernel at its first launch, from its source, the functions it calls and the constants those
read. Of a function that another kernel was launched with before, the constants count; of one that was not, they don't.
So a kernel's key depends on what was launched before it, and what a worker has compiled ahead is not found by a process
that launches in another order. Here a function's key is made where it is defined, when those it calls have theirs.
"""

# Triton has no types.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """As `triton.jit`, as a decorator with options or without. All that the function names must be defined above it."""
    if function is None:
        return lambda given: jit(given, **options)
    made = triton.jit(function, **options)
    getattr(made, "cache_key", None)  # Triton's interpreter has none
    return made

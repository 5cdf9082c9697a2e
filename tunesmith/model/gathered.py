"""A module whose weights are sharded over processes, made whole for a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within this context the weights of a module that FSDP2 or DeepSpeed's ZeRO-3 shards are whole; all its processes
    must enter it.

    Others are left as they are. A forward pass gathers by itself; this is for what reads weights outside of one.
    """
    if not hasattr(module, "unshard"):
        with _gathered_by_deepspeed(module):
            yield
        return
    sharded = cast(Any, module)
    sharded.unshard()
    try:
        yield
    finally:
        sharded.reshard()


@contextmanager
def _gathered_by_deepspeed(module: nn.Module) -> Iterator[None]:
    """By the methods that ZeRO-3 gives its parameters; those that are whole already stay so."""
    status = ((cast(Any, p), getattr(p, "ds_status", None)) for p in module.parameters())
    sharded = [parameter for parameter, state in status if state is not None and state.name == "NOT_AVAILABLE"]
    if not sharded:
        yield
        return
    sharded[0].all_gather(sharded)
    try:
        yield
    finally:
        sharded[0].partition(sharded)

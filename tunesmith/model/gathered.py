"""A module whose weights are sharded over processes, made whole for a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within this context the weights of a module that FSDP2 shards are whole; all its processes must enter it.

    Others are left as they are. A forward pass gathers by itself; this is for what reads weights outside of one.
    """
    if not hasattr(module, "unshard"):
        yield
        return
    sharded = cast(Any, module)
    sharded.unshard()
    try:
        yield
    finally:
        sharded.reshard()

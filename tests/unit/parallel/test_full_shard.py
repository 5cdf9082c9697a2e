"""What FSDP2 is asked for; tests/gpu/test_full_shard_offload.py trains with shares on the host."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from tunesmith.errors import ParallelError
from tunesmith.parallel.apply import full_shard
from tunesmith.parallel.mesh import Mesh
from tunesmith.recipe.parallel import ParallelSection


class _Two:
    """The mesh of two data-parallel processes."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def size(self, dimension: str) -> int:
        return 2 if dimension == "dp" else 1

    def submesh(self, dimension: str) -> str:
        return dimension


def _mesh(device: str) -> Mesh:
    return cast(Mesh, _Two(device))


@pytest.mark.parametrize("has_adapters", [True, False])
def test_shares_wait_on_the_host_when_asked(has_adapters: bool) -> None:
    """auto is zero3 then, for adapters too: ddp has no shares to move."""
    cut = full_shard(_mesh("cuda"), ParallelSection(offload="cpu"), torch.bfloat16, has_adapters=has_adapters)
    assert cut is not None and (cut.kind, cut.offloads) == ("zero3", True)
    options: dict[str, Any] = cut._options()
    assert isinstance(options["offload_policy"], CPUOffloadPolicy) and options["offload_policy"].pin_memory
    assert options["mesh"] == "dp"
    assert options["mp_policy"].param_dtype == (None if has_adapters else torch.bfloat16)


def test_else_they_stay() -> None:
    cut = full_shard(_mesh("cuda"), ParallelSection(strategy="zero3"), None, has_adapters=False)
    assert cut is not None and type(cut._options()["offload_policy"]) is OffloadPolicy


def test_a_cpu_has_nowhere_to_move_them_to() -> None:
    with pytest.raises(ParallelError, match="set it to none"):
        full_shard(_mesh("cpu"), ParallelSection(offload="cpu"), None, has_adapters=False)

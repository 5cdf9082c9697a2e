"""FSDP2 put on a module part by part: on a block as soon as it is whole, so that the next may take its place.

Codes and scales of quantised linears become frozen parameters, which FSDP2 gathers as bytes: a group of several dtypes
travels as uint8. Each part that was sharded stays so; what is outside the blocks is sharded last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from tunesmith.model.fp8 import Fp8Linear
from tunesmith.model.quant import NF4Linear
from tunesmith.parallel.mesh import Mesh

Sharding = Literal["zero1", "zero2", "zero3"]


@dataclass(frozen=True)
class Precision:
    """compute: what gathered weights are cast to; None: as held. reduce: what gradients are summed in; None: theirs."""

    compute: torch.dtype | None = None
    reduce: torch.dtype | None = None


@dataclass(frozen=True)
class FullShard:
    """How the data-parallel processes of a mesh share a module. offloads: shards wait on the host."""

    mesh: Mesh
    kind: Sharding
    precision: Precision = Precision()
    offloads: bool = False

    def block(self, block: nn.Module, replicated: Sequence[nn.Parameter]) -> None:
        """Shard a block whose weights are in place; its whole form is let go. One that is sharded stays as it is.

        Args: replicated: parameters that every process keeps whole, of this block at least.
        """
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if isinstance(block, FSDPModule):
            return
        hold_codes_as_parameters(block)
        reshards = self.kind == "zero3"
        fully_shard(block, **self._options(), reshard_after_forward=reshards, ignored_params=set(replicated))

    def rest(self, module: nn.Module, replicated: Sequence[nn.Parameter]) -> None:
        """Shard what is outside of the blocks, which are sharded already; sums of gradients are then never divided."""
        from torch.distributed.fsdp import FSDPModule, fully_shard

        for child in module.modules():
            if isinstance(child, NF4Linear | Fp8Linear) and next(child.buffers(recurse=False), None) is not None:
                hold_codes_as_parameters(child)
        fully_shard(module, **self._options(), reshard_after_forward=False, ignored_params=set(replicated))
        for child in module.modules():
            if isinstance(child, FSDPModule):
                child.set_gradient_divide_factor(1.0)
                child.set_force_sum_reduction_for_comms(True)

    def _options(self) -> dict[str, Any]:
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

        policy = MixedPrecisionPolicy(
            param_dtype=self.precision.compute, reduce_dtype=self.precision.reduce, cast_forward_inputs=False
        )
        return {
            "mesh": self.mesh.submesh("dp"),
            "mp_policy": policy,
            "offload_policy": CPUOffloadPolicy() if self.offloads else OffloadPolicy(),
        }


def hold_codes_as_parameters(module: nn.Module) -> None:
    """Make codes and scales of quantised linears frozen parameters, which FSDP2 shards: it leaves buffers whole.

    Doubly quantised scales become plain float32 ones, which say the same values: their second level straddles rows.
    """
    for child in module.modules():
        if isinstance(child, NF4Linear):
            child.hold_plain_scales()
        if isinstance(child, NF4Linear | Fp8Linear):
            for name, buffer in list(child.named_buffers(recurse=False)):
                delattr(child, name)
                # As a floating-point dtype of the same size: torch 2.11 can't shard others. Only bytes are moved.
                held = buffer.view(torch.float8_e4m3fn) if buffer.dtype == torch.uint8 else buffer
                child.register_parameter(name, nn.Parameter(held, requires_grad=False))

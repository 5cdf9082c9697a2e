"""What tensor-parallel processes tell each other: rows gathered, and sums of which each keeps its own rows.

Each is the other's backward pass. Between GPUs NCCL does both natively; gloo, between CPUs, scatters no sums in every
version of torch, so there everything is summed and a process takes its rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Team:
    """Processes that share each matrix, and which of them this one is."""

    group: ProcessGroup
    size: int
    index: int

    def gather(self, x_PD: Tensor) -> Tensor:
        """The rows of all processes below each other: [size * P, D]. Without gradients."""
        import torch.distributed as dist

        out = x_PD.new_empty(self.size * x_PD.shape[0], *x_PD.shape[1:])
        # Torch 2.13 has the same operation under a new name, and warns of the old one.
        gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(out, x_PD.contiguous(), group=self.group)
        return out

    def scatter_sum(self, x_TD: Tensor) -> Tensor:
        """The sum over the processes, of this one's rows: [T / size, D]. Without gradients."""
        import torch.distributed as dist

        if not x_TD.is_cuda:
            return self.own(self.summed(x_TD)).clone()
        out = x_TD.new_empty(x_TD.shape[0] // self.size, *x_TD.shape[1:])
        scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        scatter(out, x_TD.contiguous(), group=self.group)
        return out

    def summed(self, x: Tensor) -> Tensor:
        """The sum over the processes, as a tensor of its own. Without gradients."""
        total = x.detach().clone(memory_format=torch.contiguous_format)
        self.sum_(total)
        return total

    def sum_(self, x: Tensor) -> None:
        """The sum over the processes, in place; `x` is contiguous."""
        torch.distributed.all_reduce(x, group=self.group)

    def own(self, x_TD: Tensor) -> Tensor:
        """This process's rows (a view)."""
        rows = x_TD.shape[0] // self.size
        return x_TD[self.index * rows : (self.index + 1) * rows]


class _GatherRows(torch.autograd.Function):
    """See `gather_rows`."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, team: Team) -> Tensor:
        ctx.team = team
        return team.gather(x_PD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.team.scatter_sum(grads[0]), None


class _ScatterSum(torch.autograd.Function):
    """See `scatter_sum`."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, team: Team) -> Tensor:
        ctx.team = team
        return team.scatter_sum(x_TD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.team.gather(grads[0]), None


def gather_rows(x_PD: Tensor, team: Team) -> Tensor:
    """The rows of all processes, [T, D]; the gradient is summed over the processes, and each takes its rows."""
    return cast(Tensor, _GatherRows.apply(x_PD, team))


def scatter_sum(x_TD: Tensor, team: Team) -> Tensor:
    """The sum over the processes, of this one's rows, [P, D]; the gradients of all rows are gathered."""
    return cast(Tensor, _ScatterSum.apply(x_TD, team))

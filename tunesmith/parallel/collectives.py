"""What tensor-parallel processes tell each other: rows gathered, and sums of which each keeps its own rows.

Each is the other's backward pass. Between GPUs NCCL does both natively; gloo, between CPUs, scatters no sums in every
version of torch, so there everything is summed and a process takes its rows.
"""

from __future__ import annotations

from collections.abc import Callable
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
        return self.gather_beside(x_PD)()

    def gather_beside(self, x_PD: Tensor) -> Callable[[], Tensor]:
        """`gather`, begun now; what is returned waits for it."""
        import torch.distributed as dist

        rows = x_PD.contiguous()
        out = rows.new_empty(self.size * rows.shape[0], *rows.shape[1:])
        # Torch 2.13 has the same operation under a new name, and warns of the old one.
        gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return _Underway(gather(out, rows, group=self.group, async_op=True), out, rows)

    def scatter_sum(self, x_TD: Tensor) -> Tensor:
        """The sum over the processes, of this one's rows: [T / size, D]. Without gradients."""
        return self.scatter_sum_beside(x_TD)()

    def scatter_sum_beside(self, x_TD: Tensor) -> Callable[[], Tensor]:
        """`scatter_sum`, begun now; what is returned waits for it."""
        import torch.distributed as dist

        if not x_TD.is_cuda:
            total = x_TD.detach().clone(memory_format=torch.contiguous_format)
            work = dist.all_reduce(total, group=self.group, async_op=True)
            return _Underway(work, total, total, self.own)
        rows = x_TD.contiguous()
        out = rows.new_empty(rows.shape[0] // self.size, *rows.shape[1:])
        scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return _Underway(scatter(out, rows, group=self.group, async_op=True), out, rows)

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


@dataclass
class _Underway:
    """A collective that was begun. given: what it reads, which must live as long."""

    work: Any
    out: Tensor
    given: Tensor | None
    taken: Callable[[Tensor], Tensor] | None = None

    def __call__(self) -> Tensor:
        """Its result: on a GPU the stream waits for it, not the host."""
        self.work.wait()
        self.given = None
        return self.out if self.taken is None else self.taken(self.out).clone()


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

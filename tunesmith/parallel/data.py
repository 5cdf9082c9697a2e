"""Data parallelism by torch's engines: DDP, and FSDP2 in the manners of ZeRO-1, 2 and 3.

    ddp     every process holds everything; gradients are summed bucket by bucket during the backward pass
    zero1   weights, gradients and states are sharded between the steps; during a step weights and gradients are whole
    zero2   as zero1, and gradients are scattered in every micro-batch
    zero3   as zero2, and a block's weights are gathered for its forward and again for its backward pass only

A frozen base is sharded too, see `full_shard.py`. Adapters are small: every process holds them, and their gradients are
summed in one go.
Source: torch.distributed.fsdp.fully_shard; ZeRO: arXiv 1910.02054.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.errors import ParallelError
from tunesmith.parallel.full_shard import FullShard
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.spread import Batch, Loss, Piece, accumulate, squared_norm, whole_pieces


class _Called(nn.Module):
    """A module whose forward pass is any function of it: DDP watches forward passes, and losses are functions."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, function: Any, batch: Any) -> Any:
        return function(self.inner, batch)


class Replicated:
    """`ddp`: torch's DistributedDataParallel around a module."""

    def __init__(self, module: nn.Module, mesh: Mesh, *, finds_unused: bool = False) -> None:
        from torch.nn.parallel import DistributedDataParallel

        self.module, self.mesh = module, mesh
        self.num_data = mesh.size("dp")
        self._parameters = list(module.parameters())
        self._trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad and not finds_unused]
        self._engine = DistributedDataParallel(
            _Called(module),
            process_group=mesh.group("dp"),
            init_sync=False,
            gradient_as_bucket_view=True,
            find_unused_parameters=finds_unused,
            **_no_buffers(DistributedDataParallel),
        )
        self._engine.register_comm_hook(mesh.group("dp"), _sum_bucket)
        if not finds_unused:
            self._lay_buckets_out()

    def _lay_buckets_out(self) -> None:
        """A backward pass of zeros: DDP lays its buckets out anew after its first, in the order gradients came in.

        A number's place in its bucket decides in which order processes add it up, so the last bits of a resumed run's
        first step would differ from those of the unbroken run (from three processes on).
        """
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]

        def zero(module: nn.Module, batch: None) -> Tensor:
            return torch.stack([parameter.flatten()[:1].sum().float() * 0 for parameter in trained]).sum()

        self._engine(zero, None).backward()
        self.clear()

    def pieces(self) -> list[Piece]:
        """The trained parameters, whole; the first process writes them."""
        return whole_pieces(self.module.named_parameters(), is_own=self.mesh.index("dp") == 0)

    def backward(self, function: Loss[Batch], window: Sequence[Batch], factor: float) -> tuple[list[Tensor], list[int]]:
        """Through DDP, which sums the gradients during the last backward pass."""
        return accumulate(lambda batch: self._engine(function, batch), window, factor, self._around)

    def _around(self, is_last: bool) -> AbstractContextManager[None]:
        """No sums before the last micro-batch."""
        return nullcontext() if is_last else cast(AbstractContextManager[None], self._engine.no_sync())

    def collect(self) -> None:
        """DDP has summed them. Raises: ParallelError where it could not: of all that lie in a bucket with a parameter
        that was not used, this process has its own gradients only."""
        for name, parameter in self._trained:
            if parameter.grad is None:
                raise ParallelError(
                    f"{name} got no gradient, and parallel.strategy ddp sums those of all trained parameters: freeze "
                    f"it by requires_grad_(False), or set parallel.strategy zero2"
                )

    def clear(self) -> None:
        """Let the gradients go."""
        for parameter in self._parameters:
            parameter.grad = None

    def norm(self, pieces: Sequence[nn.Parameter]) -> Tensor:
        """Every process holds all of it."""
        gradients = [piece.grad for piece in pieces if piece.grad is not None]
        return squared_norm(gradients, self.mesh.device).sqrt()

    def total(self, value: Tensor) -> Tensor:
        """The sum over the data-parallel processes."""
        return _summed(value, self.mesh)

    def count(self, items: int) -> int:
        """The sum over the data-parallel processes."""
        return _counted(items, self.mesh)

    @property
    def device(self) -> torch.device:
        """This process's own."""
        return self.mesh.device


class Sharded:
    """`zero1`, `zero2`, `zero3`: torch's FSDP2 on every block and on the rest."""

    def __init__(
        self,
        module: nn.Module,
        cut: FullShard,
        *,
        blocks: Sequence[nn.Module],
        replicated: Sequence[nn.Parameter] = (),
    ) -> None:
        """Shard `module` in place as `cut` says, each of `blocks` by itself where that was not done before.

        Args: replicated: parameters that every process keeps whole (adapters).
        """
        self.module, self.mesh, self.kind = module, cut.mesh, cut.kind
        self.num_data = self.mesh.size("dp")
        self._replicated = [parameter for parameter in replicated if parameter.requires_grad]
        for block in blocks:
            cut.block(block, replicated)
        cut.rest(module, replicated)
        self._local: dict[nn.Parameter, nn.Parameter] = {}
        self._names = [(name, p) for name, p in module.named_parameters() if p.requires_grad]

    def pieces(self) -> list[Piece]:
        """This process's rows of every sharded parameter, and the replicated ones whole."""
        kept = {id(parameter) for parameter in self._replicated}
        whole = [(name, parameter) for name, parameter in self._names if id(parameter) in kept]
        shards = [self._shard(name, parameter) for name, parameter in self._names if id(parameter) not in kept]
        is_first = self.mesh.index("dp") == 0
        return [piece for piece in shards if piece.local.numel()] + whole_pieces(whole, is_own=is_first)

    def _shard(self, name: str, parameter: nn.Parameter) -> Piece:
        from torch.distributed.tensor import DTensor

        assert isinstance(parameter, DTensor)
        if parameter not in self._local:
            self._local[parameter] = nn.Parameter(parameter.to_local().detach())
        local, shape = self._local[parameter], tuple(parameter.shape)
        start = first_row(shape[0], self.num_data, self.mesh.index("dp"))
        rows = (start, start + local.shape[0])
        return Piece(name, local, shape, (rows, *((0, size) for size in shape[1:])))

    def backward(self, function: Loss[Batch], window: Sequence[Batch], factor: float) -> tuple[list[Tensor], list[int]]:
        """FSDP2's hooks are on the modules themselves."""
        return accumulate(lambda batch: function(self.module, batch), window, factor, self._around)

    @contextmanager
    def _around(self, is_last: bool) -> Iterator[None]:
        """zero1 scatters gradients in the last micro-batch only."""
        module = cast(Any, self.module)
        if self.kind == "zero1":
            module.set_requires_gradient_sync(is_last)
            module.set_reshard_after_backward(is_last)
        module.set_is_last_backward(is_last)
        yield

    def collect(self) -> None:
        """Hand each shard its gradient; sum those of the replicated parameters."""
        for parameter, local in self._local.items():
            grad = cast(Any, parameter.grad)
            local.grad = None if grad is None else grad.to_local()
            parameter.grad = None
        sum_gradients(self._replicated, self.mesh)

    def clear(self) -> None:
        """Let the gradients go."""
        for parameter in [*(parameter for _, parameter in self._names), *self._local.values()]:
            parameter.grad = None

    def norm(self, pieces: Sequence[nn.Parameter]) -> Tensor:
        """Squares of the shards are summed over the processes; replicated gradients count once."""
        kept = {id(parameter) for parameter in self._replicated}
        shards = [p.grad for p in pieces if p.grad is not None and id(p) not in kept]
        whole = [p.grad for p in pieces if p.grad is not None and id(p) in kept]
        total = _summed(squared_norm(shards, self.mesh.device), self.mesh)
        return (total + squared_norm(whole, self.mesh.device)).sqrt()

    def total(self, value: Tensor) -> Tensor:
        """The sum over the data-parallel processes."""
        return _summed(value, self.mesh)

    def count(self, items: int) -> int:
        """The sum over the data-parallel processes."""
        return _counted(items, self.mesh)

    @property
    def device(self) -> torch.device:
        """This process's own."""
        return self.mesh.device


def sum_gradients(parameters: Sequence[nn.Parameter], mesh: Mesh) -> None:
    """Sum gradients over the data-parallel processes, in one message for each dtype. A missing one counts as zero."""
    if not parameters or mesh.size("dp") == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        gradient = cast(Tensor, parameter.grad)
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        torch.distributed.all_reduce(flat, group=mesh.group("dp"))
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(
            gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
        )


def _summed(value: Tensor, mesh: Mesh) -> Tensor:
    total = value.clone()
    torch.distributed.all_reduce(total, group=mesh.group("dp"))
    return total


def _counted(items: int, mesh: Mesh) -> int:
    total = torch.tensor(items)
    torch.distributed.all_reduce(total, group=mesh.group("dp"))
    return int(total)


def _sum_bucket(group: Any, bucket: Any) -> Any:
    """DDP's buckets summed; its own would divide by the number of processes."""
    work = torch.distributed.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


# DDP compares annotations with its own classes, and these are strings.
_sum_bucket.__annotations__.clear()


def _no_buffers(engine: type) -> dict[str, Any]:
    """Buffers are the same everywhere from the start; from torch 2.13 on the option has another name."""
    names = inspect.signature(engine).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}


def first_row(rows: int, parts: int, index: int) -> int:
    """Where a share of FSDP2's split by rows begins: chunks of the ceiling, the last ones short or empty."""
    return min(-(-rows // parts) * index, rows)

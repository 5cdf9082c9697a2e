"""Data parallelism within one stage of a pipeline: gradients are summed when the last micro-batch is through.

    Summed      every process holds all of its stage
    SharedSums  zero1: and updates some rows of every parameter only, whose optimiser states it holds; before the next
                forward pass the processes send each other their rows

torch's DDP and FSDP2 hang on forward passes; the passes of a stage belong to the schedule of the pipeline.
Source of zero1: arXiv 1910.02054, section 5.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from tunesmith.parallel.collectives import Team
from tunesmith.parallel.data import sum_gradients
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.spread import Batch, Loss, Piece, accumulate, squared_norm, whole_pieces

# Values that travel in one message, unless a parameter alone has more.
_MESSAGE = 2**24
Named = Sequence[tuple[str, nn.Parameter]]


class Summed:
    """Every process holds all, as with `ddp`."""

    def __init__(self, module: nn.Module, mesh: Mesh) -> None:
        self.module, self.mesh = module, mesh
        self.num_data = mesh.size("dp")
        self.trained: Named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]

    def pieces(self) -> list[Piece]:
        """The trained parameters, whole; the first process writes them."""
        return whole_pieces(self.trained, is_own=self.mesh.index("dp") == 0)

    def settle(self) -> None:
        """Before the weights are read: what other processes updated is here afterwards."""

    def backward(self, function: Loss[Batch], window: Sequence[Batch], factor: float) -> tuple[list[Tensor], list[int]]:
        """One micro-batch after the other: without a pipeline."""
        self.settle()
        return accumulate(lambda batch: function(self.module, batch), window, factor)

    def collect(self) -> None:
        """Sum the gradients."""
        for group in _messages([parameter for _, parameter in self.trained]):
            sum_gradients(group, self.mesh)

    def clear(self) -> None:
        """Let the gradients go."""
        for _, parameter in self.trained:
            parameter.grad = None

    def norm(self, pieces: Sequence[nn.Parameter]) -> Tensor:
        """Every process holds all of it."""
        return squared_norm([piece.grad for piece in pieces if piece.grad is not None], self.mesh.device).sqrt()

    def total(self, value: Tensor) -> Tensor:
        """The sum over the data-parallel processes."""
        total = value.clone()
        if self.num_data > 1:
            torch.distributed.all_reduce(total, group=self.mesh.group("dp"))
        return total

    def count(self, items: int) -> int:
        """The sum over the data-parallel processes; the host waits."""
        return int(self.total(torch.tensor(items)))

    @property
    def device(self) -> torch.device:
        """This process's own."""
        return self.mesh.device


class SharedSums(Summed):
    """`zero1`: the optimiser's pieces are rows of the parameters, in the same memory."""

    def __init__(self, module: nn.Module, mesh: Mesh) -> None:
        super().__init__(module, mesh)
        self._team = Team(mesh.group("dp"), mesh.size("dp"), mesh.index("dp"))
        self._rows = {parameter: nn.Parameter(self._own(parameter.detach())) for _, parameter in self.trained}

    def _own(self, whole: Tensor, index: int | None = None) -> Tensor:
        """The rows of a process (None: this one), a view: chunks of the ceiling, the last ones short or empty."""
        return whole[slice(*self._bounds(whole, self._team.index if index is None else index))]

    def _bounds(self, whole: Tensor, index: int) -> tuple[int, int]:
        rows = -(-whole.shape[0] // self._team.size)
        return min(index * rows, whole.shape[0]), min((index + 1) * rows, whole.shape[0])

    def pieces(self) -> list[Piece]:
        """This process's rows of every parameter."""
        found = []
        for name, parameter in self.trained:
            rows = self._bounds(parameter, self._team.index)
            slices = (rows, *((0, size) for size in parameter.shape[1:]))
            if rows[0] < rows[1]:
                found.append(Piece(name, self._rows[parameter], tuple(parameter.shape), slices))
        return found

    @torch.no_grad()
    def settle(self) -> None:
        """Every process gets the rows of the others, in messages of one dtype."""
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in self._rows:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for parameters in by_dtype.values():
            for group in _messages(parameters):
                self._exchange(group)

    def _exchange(self, group: list[nn.Parameter]) -> None:
        # The first process has the most rows of each: the others fill up.
        message = group[0].new_zeros(sum(self._own(parameter, 0).numel() for parameter in group))
        for (start, stop), parameter in zip(self._places(group), group, strict=True):
            own = self._own(parameter)
            message[start:stop][: own.numel()].copy_(own.reshape(-1))
        shares = self._team.gather(message).chunk(self._team.size)
        for index, share in enumerate(shares):
            for (start, stop), parameter in zip(self._places(group), group, strict=True):
                rows = self._own(parameter, index)
                rows.copy_(share[start:stop][: rows.numel()].view_as(rows))

    def _places(self, group: list[nn.Parameter]) -> Iterator[tuple[int, int]]:
        """Where each parameter's rows lie in a message."""
        start = 0
        for parameter in group:
            stop = start + self._own(parameter, 0).numel()
            yield start, stop
            start = stop

    def collect(self) -> None:
        """Sum the gradients, and keep those of the own rows."""
        super().collect()
        for parameter, rows in self._rows.items():
            rows.grad = None if parameter.grad is None else self._own(parameter.grad).clone()
            parameter.grad = None

    def clear(self) -> None:
        """Let the gradients go."""
        super().clear()
        for rows in self._rows.values():
            rows.grad = None

    def norm(self, pieces: Sequence[nn.Parameter]) -> Tensor:
        """Squares of the rows are summed over the processes."""
        return self.total(super().norm(pieces).square()).sqrt()


def _messages(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Consecutive parameters that travel together."""
    group: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if group and size + parameter.numel() > _MESSAGE:
            yield group
            group, size = [], 0
        group.append(parameter)
        size += parameter.numel()
    if group:
        yield group

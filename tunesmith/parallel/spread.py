"""How a module's training is spread over processes: what the updater asks of any strategy, and the case of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from tunesmith.kernels.grad_norm import global_norm

Batch = TypeVar("Batch")
Loss = Callable[[nn.Module, Batch], tuple[Tensor, int]]
Box = tuple[tuple[int, int], ...]
"""[start, stop) of every dimension."""


@dataclass(frozen=True)
class Piece:
    """What a process holds of a trained tensor.

    name: the logical name. local: the values. slices: [start, stop] of each dimension of the whole, of `shape`.
    is_own: whether this process is the one to write it: of several that hold the same values, one is.
    chunks: where `local` is no box of the whole: (a box of `local`, the same box of the whole), for each there is;
    then `slices` are those of the rows and columns that processes of one data-parallel place share.
    """

    name: str
    local: nn.Parameter
    shape: tuple[int, ...]
    slices: Box
    is_own: bool = True
    chunks: tuple[tuple[Box, Box], ...] | None = None

    @property
    def boxes(self) -> tuple[tuple[Box, Box], ...]:
        """(A box of `local`, the same box of the whole), for all that is held."""
        if self.chunks is not None:
            return self.chunks
        return ((tuple((0, stop - start) for start, stop in self.slices), self.slices),)


class Spread(Protocol):
    """A strategy applied to a module. Gradients are summed over processes, never averaged."""

    def pieces(self) -> list[Piece]:
        """The trained parameters as they are held here: what the optimiser updates."""

    def backward(self, function: Loss[Batch], window: Sequence[Batch], factor: float) -> tuple[list[Tensor], list[int]]:
        """Forward and backward passes of this process's micro-batches, their losses times `factor`.

        Returns: the sum of the losses of each (detached, float32, not multiplied), and over how many items it is.
        """

    def collect(self) -> None:
        """After the backward passes: every piece has its gradient, summed over the processes that see other data."""

    def clear(self) -> None:
        """Let the gradients go."""

    def norm(self, pieces: Sequence[nn.Parameter]) -> Tensor:
        """The 2-norm over the whole gradients, of which these hold parts: a float32 scalar, the same everywhere."""

    def total(self, value: Tensor) -> Tensor:
        """The sum of a float32 value over the processes that see other data; the device alone waits."""

    def count(self, items: int) -> int:
        """The sum of a number over the processes that see other data; the host waits."""

    @property
    def num_data(self) -> int:
        """Processes that see other data."""

    @property
    def device(self) -> torch.device:
        """Where the losses are."""


class Alone:
    """One process: nothing is spread."""

    num_data = 1

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._parameters = list(module.parameters())

    def pieces(self) -> list[Piece]:
        """The trained parameters, whole."""
        return whole_pieces(self.module.named_parameters())

    def backward(self, function: Loss[Batch], window: Sequence[Batch], factor: float) -> tuple[list[Tensor], list[int]]:
        """One micro-batch after the other."""
        return accumulate(lambda batch: function(self.module, batch), window, factor)

    def collect(self) -> None:
        """Nothing to do."""

    def clear(self) -> None:
        """Let the gradients go. All parameters are listed once: a walk of the module would hold up every step."""
        for parameter in self._parameters:
            parameter.grad = None

    def norm(self, pieces: Sequence[nn.Parameter]) -> Tensor:
        """The norm of what is here."""
        return global_norm([piece.grad for piece in pieces if piece.grad is not None])

    def total(self, value: Tensor) -> Tensor:
        """As it is."""
        return value

    def count(self, items: int) -> int:
        """As it is."""
        return items

    @property
    def device(self) -> torch.device:
        """That of the trained parameters."""
        trained = (p.device for p in self.module.parameters() if p.requires_grad)
        return next(trained, torch.device("cpu"))


def accumulate(
    loss: Callable[[Batch], tuple[Tensor, int]],
    window: Sequence[Batch],
    factor: float,
    around: Callable[[bool], AbstractContextManager[None]] = lambda is_last: nullcontext(),
) -> tuple[list[Tensor], list[int]]:
    """`Spread.backward` of micro-batches one after the other, each within `around(whether it is the last)`."""
    losses, counts = [], []
    for place, batch in enumerate(window, start=1):
        with around(place == len(window)):
            loss_sum, count = loss(batch)
            (loss_sum * factor).backward()
        losses.append(loss_sum.detach().float())
        counts.append(count)
    return losses, counts


def whole_pieces(parameters: Iterable[tuple[str, nn.Parameter]], *, is_own: bool = True) -> list[Piece]:
    """Trained parameters that a process holds whole."""
    return [
        Piece(name, parameter, tuple(parameter.shape), tuple((0, size) for size in parameter.shape), is_own)
        for name, parameter in parameters
        if parameter.requires_grad
    ]


def squared_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """The squared 2-norm over gradients, a float32 scalar on `device`; 0 of none."""
    present = [gradient for gradient in gradients if gradient.numel()]
    return global_norm(present).to(device).square() if present else torch.zeros((), device=device)

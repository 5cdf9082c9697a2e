"""Tensor parallelism as a `Spread`, around the one that spreads each process's part over data-parallel processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from tunesmith.model.decoder import Decoder
from tunesmith.parallel.placement import Placement
from tunesmith.parallel.spread import Batch, Loss, Piece, Spread
from tunesmith.parallel.tensor import SharedStream, placements, sum_gradients


class Shared:
    """A decoder whose linears are cut (`shard_tensors`), the parts being spread by `inner`.

    The loss of a micro-batch is over this process's own tokens (`tensor.own_targets`), and the items it is counted
    over are those of whole packs: losses are summed over the team, counts are not.
    """

    def __init__(self, inner: Spread, decoder: Decoder) -> None:
        assert isinstance(decoder.stream, SharedStream)
        self.inner, self.team = inner, decoder.stream.team
        self._placed = placements(decoder)
        self._inner_pieces = inner.pieces()
        self._sharded = {id(p.local) for p in self._inner_pieces if self._placed[p.name].is_sharded}

    def pieces(self) -> list[Piece]:
        """What is held, with where it lies in the whole decoder."""
        return [self._piece(piece, self._placed[piece.name]) for piece in self._inner_pieces]

    def _piece(self, piece: Piece, placement: Placement) -> Piece:
        is_own = piece.is_own and (placement.is_sharded or self.team.index == 0)
        return replace(piece, shape=placement.shape, is_own=is_own, chunks=placement.within(piece.slices))

    def backward(self, function: Loss[Batch], window: Sequence[Batch], factor: float) -> tuple[list[Tensor], list[int]]:
        """As `inner` does."""
        return self.inner.backward(function, window, factor)

    def collect(self) -> None:
        """Gradients of what the team holds whole are summed over it too."""
        self.inner.collect()
        partial = [p.local for p in self._inner_pieces if id(p.local) not in self._sharded]
        sum_gradients(partial, self.team)

    def clear(self) -> None:
        """Let the gradients go."""
        self.inner.clear()

    def norm(self, pieces: Sequence[nn.Parameter]) -> Tensor:
        """Squares of the shards are summed over the team; what it holds whole counts once."""
        sharded = [piece for piece in pieces if id(piece) in self._sharded]
        whole = [piece for piece in pieces if id(piece) not in self._sharded]
        squares = self.inner.norm(sharded).to(self.device).square()
        self.team.sum_(squares)
        return (squares + self.inner.norm(whole).to(self.device).square()).sqrt()

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes: each has the losses of its own tokens."""
        return self.team.summed(self.inner.total(value))

    def count(self, items: int) -> int:
        """The sum over the data-parallel processes: a team counts the items of whole packs."""
        return self.inner.count(items)

    @property
    def num_data(self) -> int:
        """Processes that see other packs."""
        return self.inner.num_data

    @property
    def device(self) -> torch.device:
        """This process's own."""
        return self.inner.device


def around(inner: Spread, module: nn.Module) -> Spread:
    """`inner`, or tensor parallelism around it where `module` is a decoder whose linears are cut."""
    if isinstance(module, Decoder) and isinstance(module.stream, SharedStream):
        return Shared(inner, module)
    return inner

"""The residual stream between the parts of the blocks: every token of a pack, or a process's share of the tokens.

    stream [P, D] -> norm -> gathered [T, D] -> attention or MLP (a process's heads, a share of F) -> summed [P, D]

With sequence parallelism P = T / processes; norms and sums run on a process's own tokens, projections and the mixer on
all of them. What follows is the one process's stream, P = T, which does nothing.
Source: arXiv 2205.05198, section 4.2.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from tunesmith.model.packed import PackedTokens


class Stream(Protocol):
    """How the parts of a block are joined to the stream."""

    def padded(self, pack: PackedTokens) -> PackedTokens:
        """The pack with untrained tokens at its end, until every process has as many."""

    def own(self, x_TD: Tensor) -> Tensor:
        """The rows of this process's tokens."""

    def gathered(self, x_PD: Tensor) -> Tensor:
        """x_TD of all processes. Backward: the sum over the processes, of one's own rows."""

    def summed(self, x_TD: Tensor) -> Tensor:
        """The sum over the processes, of one's own rows. Backward: the gradients of all processes."""

    def gather(self, x_PD: Tensor) -> Tensor:
        """`gathered` without autograd, for passes that are written out."""

    def scatter(self, x_TD: Tensor) -> Tensor:
        """`summed` without autograd."""

    def gather_beside(self, x_PD: Tensor) -> Callable[[], Tensor]:
        """`gather` begun now and waited for by calling what is returned: beside whatever is queued in between."""

    def scatter_beside(self, x_TD: Tensor) -> Callable[[], Tensor]:
        """`scatter` begun now and waited for by calling what is returned."""


class WholeStream:
    """The stream of one process."""

    def padded(self, pack: PackedTokens) -> PackedTokens:
        """As it is."""
        return pack

    def own(self, x_TD: Tensor) -> Tensor:
        """As it is."""
        return x_TD

    def gathered(self, x_PD: Tensor) -> Tensor:
        """As it is."""
        return x_PD

    def summed(self, x_TD: Tensor) -> Tensor:
        """As it is."""
        return x_TD

    def gather(self, x_PD: Tensor) -> Tensor:
        """As it is."""
        return x_PD

    def scatter(self, x_TD: Tensor) -> Tensor:
        """As it is."""
        return x_TD

    def gather_beside(self, x_PD: Tensor) -> Callable[[], Tensor]:
        """As it is."""
        return lambda: x_PD

    def scatter_beside(self, x_TD: Tensor) -> Callable[[], Tensor]:
        """As it is."""
        return lambda: x_TD


WHOLE = WholeStream()

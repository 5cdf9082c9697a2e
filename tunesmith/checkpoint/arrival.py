"""Where the weights of a decoder on the meta device get their storage: all at once, or block by block as they come."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import nn

from tunesmith.model.decoder import Decoder


class TakesBlocks(Protocol):
    """What is done with a block while the next has no storage yet: quantised, adapted, sharded."""

    def prepare(self, decoder: Decoder) -> None:
        """The decoder is on the meta device, and as it will be filled."""

    def take(self, layer: int) -> None:
        """The weights of this block are in place. Those before it were taken."""


class Arrival:
    """Gives modules storage before they are filled.

    Args: taker: gets every block when it is filled, and only then does the next have storage; None: all have it now.
    """

    def __init__(self, decoder: Decoder, device: torch.device | str, taker: TakesBlocks | None) -> None:
        self._decoder, self._device, self._taker = decoder, device, taker
        self._place = ""
        if taker is None:
            give_storage(decoder, device)
        else:
            taker.prepare(decoder)

    def before(self, path: str) -> None:
        """A tensor of this module is about to be put in; modules come in the order of the decoder's."""
        names = path.split(".")
        place = ".".join(names[: 2 if names[0] == "blocks" else 1])
        if self._taker is None or place == self._place:
            return
        self.finish()
        self._place = place
        give_storage(self._decoder.get_submodule(place), self._device)

    def finish(self) -> None:
        """All tensors of the last module are in."""
        kind, _, layer = self._place.partition(".")
        if self._taker is not None and kind == "blocks":
            self._taker.take(int(layer))
        self._place = ""


def give_storage(module: nn.Module, device: torch.device | str) -> None:
    """`module.to_empty(device)`, which for tensors on the meta device imports torch's symbolic shapes, and sympy."""
    cast(Any, module)._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))

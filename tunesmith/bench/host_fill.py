"""Host memory taken once and given back, so that a machine whose memory grows as it is used really has it.

Virtual machines may begin with a part of their memory and get more when that is nearly used up. What such a machine
says is free is then too little, and a program that sizes itself by it asks for less than there is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tunesmith.hardware import available_memory_bytes
from tunesmith.model.transfer import touched_memory
from tunesmith.units import GIB

PIECE_BYTES = GIB
# What is left free at any time, and how long more is waited for where less is; then the smaller reserve holds, since
# some machines grow only when they are as short as that.
RESERVES_BYTES = (8 * GIB, 3 * GIB)
PATIENCE_S = 5.0
_LOOK_S = 0.1


@dataclass(frozen=True)
class Filled:
    """What filling did: free bytes before and after, the most that was held, and for how long it took."""

    before_bytes: int
    held_bytes: int
    after_bytes: int
    seconds: float


class HostFill:
    """Takes memory in a thread until it holds `most_bytes` or no more comes, and gives all of it back."""

    def __init__(
        self,
        most_bytes: int,
        *,
        piece_bytes: int = PIECE_BYTES,
        reserves_bytes: Sequence[int] = RESERVES_BYTES,
        patience_s: float = PATIENCE_S,
        available: Callable[[], int] = available_memory_bytes,
    ) -> None:
        self._most, self._piece, self._reserves = most_bytes, piece_bytes, list(reserves_bytes)
        self._patience_s, self._available = patience_s, available
        self._made: list[Filled] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="host fill", daemon=True)
        self._thread.start()

    def wait(self) -> Filled:
        """What was done, waited for. Raises: what filling raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._made[0]

    def _work(self) -> None:
        try:
            self._made.append(self._fill())
        except BaseException as error:
            self._error = error

    def _fill(self) -> Filled:
        began, before = time.perf_counter(), self._available()
        pieces: list[torch.Tensor] = []
        held = 0
        while held < self._most and self._comes():
            pieces.append(touched_memory(min(self._piece, self._most - held)))
            held += pieces[-1].numel()
        pieces.clear()
        return Filled(before, held, self._available(), time.perf_counter() - began)

    def _comes(self) -> bool:
        """Whether a piece and a reserve are free, within the time that growing may take."""
        while self._reserves:
            until = time.perf_counter() + self._patience_s
            while time.perf_counter() <= until:
                if self._available() >= self._piece + self._reserves[0]:
                    return True
                time.sleep(_LOOK_S)
            self._reserves.pop(0)
        return False

"""An int4 weight as our own C++ (kernels/cpu_step.cpp) takes it where prompts want it in bfloat16."""

from __future__ import annotations

import ctypes
import threading

import torch
from torch import Tensor

from tunesmith.engine.cpu_step import Weight, int4_weight
from tunesmith.model.int4 import Int4Linear

_kept = threading.local()


def _room(count: int) -> Tensor:
    """bfloat16 [count] of this thread: fresh memory would cost as much as what is written into it."""
    room: Tensor | None = getattr(_kept, "room", None)
    if room is None or len(room) < count:
        room = _kept.room = torch.empty(count, dtype=torch.bfloat16)
    return room[:count]


class Int4Table:
    """One linear's weight. What it points to is kept with it."""

    def __init__(self, linear: Int4Linear) -> None:
        self.shape = (linear.out_features, linear.in_features)
        self._kept: list[Tensor] = []
        self._weight: Weight = int4_weight(linear, self._kept)

    def widened(self, library: ctypes.CDLL) -> Tensor:
        """weight_FD in bfloat16, to the bits of `dequantize_int4`; valid until this thread widens the next one."""
        out_FD = _room(self.shape[0] * self.shape[1]).view(self.shape)
        library.tunesmith_widen(ctypes.byref(self._weight), out_FD.data_ptr(), torch.get_num_threads())
        return out_FD

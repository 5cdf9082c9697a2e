"""An int4 weight as our own C++ (kernels/cpu_step.cpp) takes it where prompts want it in bfloat16."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from tunesmith.engine.cpu_step import Weight, int4_weight
from tunesmith.model.int4 import Int4Linear


class Int4Table:
    """One linear's weight. What it points to is kept with it."""

    def __init__(self, linear: Int4Linear) -> None:
        self.shape = (linear.out_features, linear.in_features)
        self._kept: list[Tensor] = []
        self._weight: Weight = int4_weight(linear, self._kept)

    def widened(self, library: ctypes.CDLL) -> Tensor:
        """weight_FD in bfloat16, to the bits of `dequantize_int4`."""
        out_FD = torch.empty(self.shape, dtype=torch.bfloat16)
        library.tunesmith_widen(ctypes.byref(self._weight), out_FD.data_ptr(), torch.get_num_threads())
        return out_FD

"""`find_thresholds` and `choose` of a CPU's rows in one call of our own C++ (cpu_draw.hpp).

Every logit gets its noise, which costs less there than finding out which need any. The tokens are those of the
references but for the rounding of a logarithm, and a row's token does not depend on the other rows.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

_I64, _POINTER = ctypes.c_int64, ctypes.c_void_p


class _Draw(ctypes.Structure):
    _fields_ = [
        ("logits", _POINTER),
        *((name, _I64) for name in ("is_half", "rows", "vocab", "ld", "threads")),
        *((name, _POINTER) for name in ("temperatures", "top_p", "min_p", "seeds", "top_k")),
        *((name, _POINTER) for name in ("slots", "positions", "last_tokens", "tokens")),
    ]


class NativeDraw:
    """Draws from tables by slot, all of them contiguous and on the CPU: floats in float32, the rest int64."""

    def __init__(
        self,
        library: ctypes.CDLL,
        *,
        temperatures_N: Tensor,
        top_p_N: Tensor,
        min_p_N: Tensor,
        seeds_N: Tensor,
        top_k_N: Tensor,
        last_tokens_N: Tensor,
    ) -> None:
        self.library = library
        self._tables = (temperatures_N, top_p_N, min_p_N, seeds_N, top_k_N)
        self._places = [table.data_ptr() for table in self._tables]
        self._last_tokens = last_tokens_N

    def __call__(self, logits_BV: Tensor, slots_B: Tensor, positions_B: Tensor) -> Tensor:
        """tokens_B as `choose` gives them with the thresholds of `find_thresholds`, kept as last tokens too."""
        if logits_BV.dtype not in (torch.float32, torch.bfloat16) or logits_BV.stride(-1) != 1:
            logits_BV = logits_BV.float().contiguous()
        num, vocab_size = logits_BV.shape
        slots_B, positions_B = slots_B.contiguous(), positions_B.contiguous()
        tokens_B = torch.empty(num, dtype=torch.int64)
        draw = _Draw(
            logits_BV.data_ptr(),
            logits_BV.dtype == torch.bfloat16,
            num,
            vocab_size,
            logits_BV.stride(0),
            torch.get_num_threads(),
            *self._places,
            slots_B.data_ptr(),
            positions_B.data_ptr(),
            self._last_tokens.data_ptr(),
            tokens_B.data_ptr(),
        )
        if self.library.tunesmith_draw(ctypes.byref(draw)):
            raise MemoryError(f"no memory to draw from {num} rows of {vocab_size} logits")
        return tokens_B

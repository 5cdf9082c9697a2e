"""Where plain torch may compute in place: float32 on a CPU, where nothing is rounded between two operators.

The references make float32 copies first, and every copy of a wide activation is a trip through memory.
"""

from __future__ import annotations

import torch
from torch import Tensor


def in_float32_on_cpu(*tensors: Tensor | None) -> bool:
    """Whether all of these, None left out, are float32 on a CPU."""
    return all(t is None or (t.dtype == torch.float32 and t.device.type == "cpu") for t in tensors)

"""Custom operators without torch's dispatcher, for passes that only answer.

A call of an operator that is written in Python takes 40 to 80 us on its way through the dispatcher (autograd, versions
of what it changes), more than what it launches. Tracing, compiling and counting on the meta device must see operators;
a pass in inference mode over tensors of a real device needs none of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def direct(operator: Callable[..., Any], tensor: Tensor) -> Callable[..., Any]:
    """The function behind an operator where nothing has to see it, else the operator. tensor: one of its arguments."""
    is_seen = (
        type(tensor) is not Tensor
        or tensor.device.type == "meta"
        or not torch.is_inference_mode_enabled()
        or torch.compiler.is_compiling()
    )
    if is_seen:
        return operator
    behind: Callable[..., Any] = getattr(operator, "_init_fn", operator)
    return behind

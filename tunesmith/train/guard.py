"""Whether a step may update anything is decided on the device, so that the host need not look first."""

from __future__ import annotations

import torch
from torch import Tensor


class Guard:
    """Keeps NaN and Inf out of the weights without a wait.

    stopped: float32 scalar on the device; 1 from the first step on whose losses or gradient norm are not all finite,
    else 0. It is the optimiser's `found_inf`: where it is 1 an update changes nothing, not even the step counter.
    It sticks, so that the updates that were already under way when the host reads of it change nothing either.
    """

    def __init__(self, device: torch.device) -> None:
        self.stopped = torch.zeros((), dtype=torch.float32, device=device)

    def look(self, numbers: Tensor) -> None:
        """Stop when one of `numbers`, float32 of any shape, is not finite."""
        bad = numbers.isfinite().all().logical_not_().to(torch.float32)
        torch.maximum(self.stopped, bad, out=self.stopped)

    def clear(self) -> None:
        """Updates happen again."""
        self.stopped.zero_()


def gradient_divisor(norm: Tensor, divisor: float, max_norm: float) -> Tensor:
    """What gradients are divided by (the optimisers' `grad_scale`), a float32 scalar on their device.

    Args:
        norm: the 2-norm of all gradients as they are, that is `divisor` times too large.
        max_norm: the limit of the norm after the division; 0: none.
    """
    if not max_norm:
        return torch.full_like(norm, divisor)
    return (norm / max_norm).clamp_(min=divisor)

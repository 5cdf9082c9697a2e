"""AdamW whose large tensors take one pass of our kernel, and whose small ones go together through torch's."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from tunesmith.kernels.adamw import DTYPES, AdamWSettings, Updated, update
from tunesmith.kernels.nf4 import use_kernel

# Weights with more bytes are worth a launch of their own; torch updates many small ones in one.
LARGE_BYTES = 4 * 2**20


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW: its settings, its states (`step`, `exp_avg`, `exp_avg_sq`) and its guard.

    Takes `grad_scale` and `found_inf` as torch's does: gradients are divided by the one, and nothing is updated where
    the other is 1, step counters included, which are float32 scalars on the device. A weight's way depends on the
    weight alone, so that the same bits come out whichever weights are updated with it. The host does not wait; a step
    recorded in a CUDA graph keeps the learning rate it was recorded with.

    `amsgrad`, `maximize` and learning rates that are tensors are torch.optim.AdamW's alone.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient. Returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update_group(group)
        return loss

    def _update_group(self, group: dict[str, Any]) -> None:
        small, large = [], defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            if not self.state[parameter]:
                self.state[parameter] = initial_state(parameter)
            if _takes_kernel(parameter, self.state[parameter]):
                large[parameter.device].append(parameter)
            else:
                small.append(parameter)
        self._update_together(small, group)
        for device, parameters in large.items():
            self._update_by_kernel(parameters, group, device)

    def _update_by_kernel(self, parameters: list[Tensor], group: dict[str, Any], device: torch.device) -> None:
        divisor, stopped = self._guard(device)
        states = [self.state[parameter] for parameter in parameters]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, [1 - stopped] * len(steps))
        updated = Updated(
            [parameter.detach() for parameter in parameters],
            [_gradient(parameter).contiguous() for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            steps,
        )
        settings = AdamWSettings(group["lr"], group["betas"], group["eps"], group["weight_decay"])
        update(updated, settings, divisor, stopped)

    def _update_together(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """By torch's own fused update."""
        if not parameters:
            return
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [_gradient(parameter) for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _guard(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """What gradients are divided by, and whether nothing is updated: float32 scalars on the device."""
        divisor, stopped = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        one = torch.ones((), device=device) if divisor is None else divisor.to(device, non_blocking=True)
        return one, torch.zeros((), device=device) if stopped is None else stopped.to(device, non_blocking=True)


def _takes_kernel(parameter: Tensor, state: dict[str, Any]) -> bool:
    """Whether a weight is updated by our kernel: large ones, and those whose tensors are of several dtypes."""
    tensors = (parameter, _gradient(parameter), state["exp_avg"], state["exp_avg_sq"])
    dtypes = {tensor.dtype for tensor in tensors}
    if not dtypes.issubset(DTYPES) or not use_kernel(parameter.device):
        return False
    held = all(tensor.is_contiguous() for tensor in tensors if tensor is not tensors[1])
    return held and (len(dtypes) > 1 or parameter.nbytes > LARGE_BYTES)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def initial_state(parameter: Tensor) -> dict[str, Any]:
    """As torch's fused AdamW begins."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }

"""AdamW with block-wise 8-bit states, as a torch optimiser."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tunesmith.kernels.adam8bit import adamw_, update
from tunesmith.kernels.adam8bit_moments import BLOCK as BLOCK
from tunesmith.kernels.adam8bit_moments import AdamSettings, Moments, dynamic_codebook

# Smaller tensors (norms, biases) keep float32 states: they cost nothing and are the most sensitive.
SMALLEST_QUANTISED = 4096


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose two moments are held in 8 bits, with a float32 scale for each block of 256.

    Takes `grad_scale` and `found_inf` as torch's fused optimisers do: gradients are divided by the one, and nothing
    is updated where the other is 1. Step counters are kept on the host, which doesn't know of the latter: see
    `optimizers.take_back_step`.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        chosen = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter, group in chosen:
            state = self.state[parameter]
            if not state:
                state.update(initial_state(parameter))
            state["step"] += 1
            self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        settings = AdamSettings(state["step"], group["lr"], group["betas"], group["eps"], group["weight_decay"])
        flat, flat_grad = parameter.detach().view(-1), grad.reshape(-1)
        divisor, stopped = self._guard(parameter.device)
        if "exp_avg" in state:
            _update_small(flat, flat_grad, state, settings, divisor, stopped)
            return
        names = ("exp_avg_codes", "exp_avg_absmax", "exp_avg_sq_codes", "exp_avg_sq_absmax")
        update(flat, flat_grad, Moments(*(state[name] for name in names)), settings, divisor, stopped)

    def _guard(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """What gradients are divided by, and whether nothing is updated: float32 scalars on the device."""
        divisor, stopped = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        one = torch.ones((), device=device) if divisor is None else divisor
        return one, torch.zeros((), device=device) if stopped is None else stopped


def initial_state(parameter: Tensor) -> dict[str, Any]:
    """Both moments zero, in 8 bits where the parameter is large."""
    count, device = parameter.numel(), parameter.device
    if count < SMALLEST_QUANTISED:
        zeros = torch.zeros(count, dtype=torch.float32, device=device)
        return {"step": 0, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    state: dict[str, Any] = {"step": 0}
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        zero = int(torch.searchsorted(dynamic_codebook(signed), 0.0))
        state[f"{name}_codes"] = torch.full((count,), zero, dtype=torch.uint8, device=device)
        state[f"{name}_absmax"] = torch.zeros(-(-count // BLOCK), dtype=torch.float32, device=device)
    return state


def _update_small(
    parameter: Tensor, grad: Tensor, state: dict[str, Any], settings: AdamSettings, divisor: Tensor, stopped: Tensor
) -> None:
    """A tensor with float32 moments: what an update would make of it is put in place unless the guard has stopped."""
    held = (parameter, state["exp_avg"], state["exp_avg_sq"])
    weight, mean, square = (tensor.clone() for tensor in held)
    adamw_(weight, grad.float() / divisor, mean, square, settings)
    for tensor, updated in zip(held, (weight, mean, square), strict=True):
        tensor.copy_(torch.where(stopped == 0, updated, tensor))

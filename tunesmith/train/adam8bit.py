"""AdamW with block-wise 8-bit states. Source: arXiv 2110.02861, sections 1.2 and 2."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
# Smaller tensors (norms, biases) keep float32 states: they cost nothing and are the most sensitive.
SMALLEST_QUANTISED = 4096
# A large tensor is updated slice by slice, so that its states are never dequantised as a whole.
SLICE = BLOCK * 2**16
# Updates that may be under way when it turns out that one did not happen.
MOST_TAKEN_BACK = 4


@lru_cache
def dynamic_codebook(signed: bool) -> Tensor:
    """The 256 values of dynamic tree quantisation, float32, ascending, in [-1, 1] or [0, 1].

    A code is a decimal exponent written in unary and a linear fraction in the bits that are left: the decade
    [10^(i-7), 10^(i-6)) is cut into 2^i equal parts (2^(i+1) when no bit goes to the sign), i = 0..6, and each
    is represented by its middle; 0 and 1 are exact.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        parts = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float64)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
        values += middles + ([-middle for middle in middles] if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


def quantise_blocks(values: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (uint8, one per value) and the absolute maximum of each block of 256 (float32) of a flat tensor."""
    count = values.numel()
    padded = torch.nn.functional.pad(values, (0, -count % BLOCK)).view(-1, BLOCK)
    absmax = padded.abs().amax(dim=1)
    scaled = padded / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    middles = (codebook[1:] + codebook[:-1]) / 2
    codes = torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8)
    return codes.view(-1)[:count], absmax


def dequantise_blocks(codes: Tensor, absmax: Tensor, codebook: Tensor) -> Tensor:
    """The float32 values of `quantise_blocks`."""
    scales = absmax.repeat_interleave(BLOCK)[: codes.numel()]
    return codebook[codes.int()] * scales


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose two moments are held in 8 bits, with a float32 scale for each block of 256.

    Takes `grad_scale` and `found_inf` as torch's fused optimisers do: gradients are divided by the one, and nothing
    is updated where the other is 1. Step counters are kept on the host, which doesn't know of the latter:
    `take_back_steps` puts them right.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._counted: deque[list[Tensor]] = deque(maxlen=MOST_TAKEN_BACK)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        chosen = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter, _ in chosen:
            state = self.state[parameter]
            if not state:
                state.update(_initial_state(parameter))
            state["step"] += 1
        self._counted.append([parameter for parameter, _ in chosen])
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        for parameter, group in chosen:
            self._update(parameter, group)

    def take_back_steps(self, count: int) -> None:
        """The last `count` updates (at most 4) did not happen: their parameters' step counters go back."""
        for _ in range(min(count, len(self._counted))):
            for parameter in self._counted.pop():
                self.state[parameter]["step"] -= 1

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        flat, grad = parameter.view(-1), parameter.grad
        assert grad is not None
        flat_grad = grad.reshape(-1)
        divisor: Tensor | None = getattr(self, "grad_scale", None)
        if "exp_avg" in state:
            _adamw(flat, _divided(flat_grad, divisor), state["exp_avg"], state["exp_avg_sq"], state["step"], group)
            return
        for start in range(0, flat.numel(), SLICE):
            part = slice(start, min(start + SLICE, flat.numel()))
            blocks = slice(start // BLOCK, -(-part.stop // BLOCK))
            _update_slice(flat[part], _divided(flat_grad[part], divisor), state, part, blocks, group)


def _divided(grad: Tensor, divisor: Tensor | None) -> Tensor:
    """The gradient in float32."""
    return grad.float() if divisor is None else grad.float() / divisor


def _initial_state(parameter: Tensor) -> dict[str, Any]:
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


def _update_slice(
    parameter: Tensor, grad: Tensor, state: dict[str, Any], part: slice, blocks: slice, group: dict[str, Any]
) -> None:
    books = {"exp_avg": _codebook(True, parameter.device), "exp_avg_sq": _codebook(False, parameter.device)}
    moments = {
        name: dequantise_blocks(state[f"{name}_codes"][part], state[f"{name}_absmax"][blocks], book)
        for name, book in books.items()
    }
    _adamw(parameter, grad, moments["exp_avg"], moments["exp_avg_sq"], state["step"], group)
    for name, book in books.items():
        codes, absmax = quantise_blocks(moments[name], book)
        if name == "exp_avg_sq":
            # Rounded to zero, it would leave eps alone to divide by: a step of thousands of learning rates.
            codes.clamp_(min=1).mul_(moments[name] > 0)
        state[f"{name}_codes"][part] = codes
        state[f"{name}_absmax"][blocks] = absmax


@lru_cache
def _codebook(signed: bool, device: torch.device) -> Tensor:
    return dynamic_codebook(signed).to(device)


def _adamw(parameter: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: int, group: dict[str, Any]) -> None:
    """AdamW in float32, in place. Source: arXiv 1711.05101, algorithm 2."""
    beta1, beta2 = group["betas"]
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    update = (mean / (1 - beta1**step)).div_(denominator)
    wide = parameter.float().mul_(1 - group["lr"] * group["weight_decay"])
    parameter.copy_(wide.sub_(update, alpha=group["lr"]))

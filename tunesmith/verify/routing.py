"""A mixture of experts against its formula: every expert on every token, weighted by the router where it was chosen."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.arch import ModelConfig, MoeConfig
from tunesmith.model.layers import Linear
from tunesmith.model.moe import Experts
from tunesmith.verify.kernels import Case, Shapes

MOST_EXPERTS = 32
MOST_INNER = 64


def routing_case(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Case:
    """Sorted and grouped by expert against the formula: what comes out, and the gradients of tokens and router.

    The model's width and choices, its experts no more than 32 and no wider than 64.
    """
    config = small_experts(shapes.config)
    assert config.moe is not None
    moe = config.moe
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        experts = Experts(moe, config.hidden_size, partial(_expert, config.hidden_size, moe.intermediate_size))
    experts.requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_(0.0, 0.02, generator=generator)
    router, x = (torch.randn(n, config.hidden_size, generator=generator, device=device) for n in (moe.num_experts, 48))
    # Scores far apart: which expert is the better one is not for a rounding to decide.
    router, x = (router * 8 / config.hidden_size**0.5).to(dtype), x.to(dtype)
    chosen = F.linear(x, router).float().topk(moe.num_experts_per_tok, dim=-1).indices

    def ours(x: Tensor, router: Tensor) -> Tensor:
        return torch.func.functional_call(experts, {"router.weight": router}, (x,))

    detail = f"{len(x)} tokens, {moe.num_experts_per_tok} of {moe.num_experts} experts, hidden {config.hidden_size}"
    return Case("expert routing", ours, partial(_every_expert, experts, moe, chosen), (x, router), detail)


def small_experts(config: ModelConfig) -> ModelConfig:
    """The configuration with experts that few tokens fill and little memory holds."""
    assert config.moe is not None
    number = min(config.moe.num_experts, MOST_EXPERTS)
    moe = replace(
        config.moe,
        num_experts=number,
        num_experts_per_tok=min(config.moe.num_experts_per_tok, number),
        intermediate_size=min(config.moe.intermediate_size, MOST_INNER),
    )
    return replace(config, moe=moe)


def _expert(hidden_size: int, inner_size: int) -> nn.Module:
    """An MLP: what an expert computes is nothing to its routing."""
    up, down = Linear(hidden_size, {"up": inner_size}, False), Linear(inner_size, {"down": hidden_size}, False)
    return nn.Sequential(up, nn.SiLU(), down)


def _every_expert(experts: Any, moe: MoeConfig, chosen: Tensor, x: Tensor, router: Tensor) -> Tensor:
    """sum over e of weight[t, e] * expert_e(x_t), the weight 0 where e was not chosen for t."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scores = F.linear(x, router).to(wide).softmax(-1)
    taken = scores * torch.zeros_like(scores).scatter(1, chosen, 1.0)
    weights = taken / taken.sum(-1, keepdim=True) if moe.norm_topk_prob else taken
    parts = torch.stack([expert(x) for expert in experts.experts], dim=1)
    return (weights.to(x.dtype)[:, :, None] * parts).sum(1)

"""A mixture of experts in place of an MLP."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.arch import MoeConfig
from tunesmith.model.layers import Linear


class Experts(nn.Module):
    """Each token goes to its best `num_experts_per_tok` experts, weighted by the router's softmax.

    The weights are renormalised over the chosen experts where the family says so.
    Source: arXiv 2401.04088, section 2.
    """

    def __init__(self, config: MoeConfig, hidden_size: int, make_expert: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.experts = nn.ModuleList(make_expert() for _ in range(config.num_experts))
        self.router = Linear(hidden_size, {"gate": config.num_experts}, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        scores_TE = F.softmax(self.router(x_TD), dim=-1, dtype=torch.float32)
        weights, chosen = scores_TE.topk(self.num_experts_per_tok, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x_TD)
        for index, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == index)
            # An expert without tokens still runs on none, so that its parameters always get a gradient.
            part = expert(x_TD[rows]) * weights[rows, slot, None].to(x_TD.dtype)
            out = out.index_add(0, rows, part)
        return out

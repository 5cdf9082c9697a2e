"""A mixture of experts in place of an MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.arch import MoeConfig
from tunesmith.model.layers import Linear


class Experts(nn.Module):
    """Each token goes to its best `num_experts_per_tok` experts, weighted by the router's softmax.

    The weights are renormalised over the chosen experts where the family says so. Rows are sorted by expert, so that
    the host waits for the device once (for how many rows each expert has), however many experts there are.
    Source: arXiv 2401.04088, section 2.
    """

    def __init__(self, config: MoeConfig, hidden_size: int, make_expert: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.experts = nn.ModuleList(make_expert() for _ in range(config.num_experts))
        self.router = Linear(hidden_size, {"gate": config.num_experts}, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TK, chosen_TK = self.route(x_TD)
        order_N, inverse_N, counts = sort_by_expert(chosen_TK, len(self.experts))
        parts = _rows_of_experts(x_TD, order_N, inverse_N, self.num_experts_per_tok).split(counts)
        # An expert without tokens still runs on none, so that its parameters always get a gradient.
        out_ND = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        out_TKD = _permuted(out_ND, inverse_N, order_N).view(*chosen_TK.shape, -1)
        return (out_TKD * weights_TK.to(x_TD.dtype)[:, :, None]).sum(1)

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The weights (float32) and the numbers of each token's experts, the best first: [T, K] both."""
        scores_TE = F.softmax(self.router(x_TD), dim=-1, dtype=torch.float32)
        weights_TK, chosen_TK = scores_TE.topk(self.num_experts_per_tok, dim=-1)
        if self.norm_topk_prob:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return weights_TK, chosen_TK


def sort_by_expert(chosen_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, list[int]]:
    """The order that sorts the T * K choices by expert, its inverse, and how many choices each expert has.

    The counts are the only thing that the host waits for.
    """
    experts_N, order_N = chosen_TK.flatten().sort(stable=True)
    numbers = torch.arange(order_N.numel(), device=order_N.device)
    inverse_N = torch.empty_like(order_N).scatter_(0, order_N, numbers)
    ends_E = torch.searchsorted(experts_N, torch.arange(num_experts, device=order_N.device), right=True)
    ends = ends_E.tolist()
    return order_N, inverse_N, [end - start for start, end in zip([0, *ends], ends, strict=False)]


class _RowsOfExperts(torch.autograd.Function):
    """Each token's row K times, in the experts' order.

    The gradient is gathered and summed over K in a fixed order, where that of indexing would add rows by atomic
    operations: in another order, and to other bits, at every run.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, inverse_N: Tensor, num_choices: int) -> Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.num_choices = num_choices
        return x_TD.index_select(0, order_N // num_choices)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_N,) = ctx.saved_tensors
        gradient_ND = gradients[0].index_select(0, inverse_N)
        return gradient_ND.unflatten(0, (-1, ctx.num_choices)).sum(1), None, None, None


class _Permuted(torch.autograd.Function):
    """rows_ND[order]; the gradient is gathered by the inverse."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        return rows_ND.index_select(0, order_N)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inverse_N,) = ctx.saved_tensors
        return gradients[0].index_select(0, inverse_N), None, None


_rows_of_experts: Callable[[Tensor, Tensor, Tensor, int], Tensor] = _RowsOfExperts.apply
_permuted: Callable[[Tensor, Tensor, Tensor], Tensor] = _Permuted.apply

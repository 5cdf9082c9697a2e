"""Routing: every token through its best experts, and one wait for the device a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.arch import MoeConfig
from tunesmith.model.layers import Linear
from tunesmith.model.moe import Experts, sort_by_expert

# What reads a value of the device on the host, or makes a tensor whose size depends on one.
WAITS = ("_local_scalar_dense", "nonzero", "unique", "bincount", "masked_select", "item")


def make_experts(num_experts: int = 6, best: int = 2, norm: bool = True) -> Experts:
    torch.manual_seed(0)
    config = MoeConfig(num_experts, best, 8, norm, (0,))
    experts = Experts(config, 8, lambda: Linear(8, {"up": 8}, bias=False))
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    return experts


def one_at_a_time(experts: Experts, x_TD: Tensor) -> Tensor:
    """The formula, token by token."""
    scores_TE = experts.router(x_TD).softmax(-1)
    rows = []
    for x_D, scores_E in zip(x_TD, scores_TE, strict=True):
        best = sorted(range(len(experts.experts)), key=lambda i: -float(scores_E[i].detach()))[
            : experts.num_experts_per_tok
        ]
        total = sum(scores_E[i] for i in best) if experts.norm_topk_prob else 1.0
        rows.append(sum(scores_E[i] / total * experts.experts[i](x_D[None])[0] for i in best))
    return torch.stack(rows)


@pytest.mark.parametrize(("tokens", "best", "norm"), [(1, 1, False), (5, 2, True), (40, 3, False), (7, 6, True)])
def test_every_token_goes_through_its_best_experts(tokens: int, best: int, norm: bool) -> None:
    experts = make_experts(best=best, norm=norm)
    x = torch.randn(tokens, 8, requires_grad=True)
    direction = torch.randn(tokens, 8)
    leaves = [x, *experts.parameters()]
    ours, theirs = experts(x), one_at_a_time(experts, x)
    torch.testing.assert_close(ours, theirs)
    gradients = torch.autograd.grad(ours, leaves, direction)
    expected = torch.autograd.grad(theirs, leaves, direction, materialize_grads=True)
    for mine, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, right)


def test_an_expert_without_tokens_gets_a_gradient_of_zero() -> None:
    experts = make_experts(num_experts=6, best=1)
    experts(torch.randn(2, 8)).sum().backward()
    gradients = [expert.weight.grad for expert in experts.experts]
    assert all(gradient is not None for gradient in gradients)
    assert sum(bool(gradient.any()) for gradient in gradients) <= 2


def test_choices_are_sorted_by_expert_and_found_again() -> None:
    chosen = torch.tensor([[3, 0], [0, 1], [3, 1]])
    order, inverse, counts = sort_by_expert(chosen, 5)
    assert counts == [2, 2, 0, 2, 0]
    assert order.tolist() == [1, 2, 3, 5, 0, 4]  # equal experts keep the tokens' order
    assert order[inverse].tolist() == list(range(6))


class _Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        reads_mask = name in ("index", "index_put") and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in WAITS or reads_mask or (name == "_to_copy" and (kwargs or {}).get("device") is not None):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _count_waits(monkeypatch: pytest.MonkeyPatch, num_experts: int) -> int:
    """Device waits of a forward and a backward pass; a list from a tensor is one, whatever it reads inside."""
    experts, x = make_experts(num_experts=num_experts), torch.randn(9, 8)
    reads: list[int] = []
    original = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: reads.append(1) or original(self.detach().clone()))
    with _Waits() as waits:
        experts(x).sum().backward()
    monkeypatch.undo()
    return len(reads) + len(waits.names)


@pytest.mark.parametrize("num_experts", [2, 16])
def test_the_host_waits_once_however_many_experts(monkeypatch: pytest.MonkeyPatch, num_experts: int) -> None:
    """Each expert's rows were once looked up by themselves: a wait for every expert in every layer."""
    assert _count_waits(monkeypatch, num_experts) == 1

"""Expert routing: passes as it is, and fails where a fault is planted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.arch import ModelConfig, MoeConfig
from tunesmith.model import moe as moe_module
from tunesmith.model.moe import Experts
from tunesmith.verify.check import run_check
from tunesmith.verify.kernels import Shapes, compare
from tunesmith.verify.routing import routing_case, small_experts

CPU = torch.device("cpu")


def _config(num_experts: int = 6, best: int = 2, norm: bool = True) -> ModelConfig:
    return ModelConfig(
        family="mixtral", vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=48, max_position_embeddings=64, norm_eps=1e-5,
        moe=MoeConfig(num_experts, best, 96, norm, (0,)),
    )  # fmt: skip


def _passes(config: ModelConfig, dtype: torch.dtype = torch.float32) -> bool:
    return run_check("x", lambda: compare(routing_case(Shapes(config, 16, 64), CPU, dtype))).passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_experts", "best", "norm"), [(6, 2, True), (128, 8, True), (4, 4, False), (5, 1, False)])
def test_routing_is_the_formula(num_experts: int, best: int, norm: bool, dtype: torch.dtype) -> None:
    assert _passes(_config(num_experts, best, norm), dtype)


def test_large_models_are_checked_with_small_experts() -> None:
    small = small_experts(_config(512, 64)).moe
    assert small is not None
    assert (small.num_experts, small.num_experts_per_tok, small.intermediate_size) == (32, 32, 64)


_SORT, _ROUTE, _GATHER = moe_module.sort_by_expert, Experts.route, moe_module._rows_of_experts


def _wrong_inverse(chosen: Tensor, num_experts: int) -> Any:
    order, _, counts = _SORT(chosen, num_experts)
    return order, order, counts


def _counts_shifted(chosen: Tensor, num_experts: int) -> Any:
    order, inverse, counts = _SORT(chosen, num_experts)
    return order, inverse, [*counts[1:], counts[0]]


def _never_renormalised(self: Experts, x: Tensor) -> tuple[Tensor, Tensor]:
    self.norm_topk_prob = False
    return _ROUTE(self, x)


def _worst_experts(self: Experts, x: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.softmax(self.router(x), -1)
    weights, chosen = scores.topk(self.num_experts_per_tok, largest=False)
    return weights / weights.sum(-1, keepdim=True), chosen


def _gradient_lost(x: Tensor, *rest: Any) -> Tensor:
    return _GATHER(x.detach(), *rest)


@pytest.mark.parametrize(
    ("where", "name", "fault"),
    [
        (moe_module, "sort_by_expert", _wrong_inverse),
        (moe_module, "sort_by_expert", _counts_shifted),
        (moe_module, "_rows_of_experts", _gradient_lost),
        (Experts, "route", _never_renormalised),
        (Experts, "route", _worst_experts),
    ],
)
def test_faults_of_the_routing_are_caught(where: Any, name: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, name, fault)
    assert not _passes(_config())

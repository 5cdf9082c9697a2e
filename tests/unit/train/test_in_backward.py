"""Updates in the backward pass: the same bits as after it, gradients freed as they come, what a NaN leaves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tunesmith.errors import NonFiniteError
from tunesmith.recipe.schema import TrainSection
from tunesmith.train.update import Updater

SETTINGS: dict[str, Any] = {"learning_rate": 0.05, "weight_decay": 0.01, "max_grad_norm": 0.0}


class _Model(nn.Module):
    """A tied weight at both ends, matrices large enough for 8-bit states, a vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 96)
        self.middle = nn.Linear(96, 96)
        self.norm = nn.LayerNorm(96)
        self.frozen = nn.Linear(96, 96).requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.frozen(torch.relu(self.middle(self.embedding(tokens)))))
        return hidden @ self.embedding.weight.t()


def _loss(module: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, int]:
    return nn.functional.cross_entropy(module(tokens), tokens.flip(0), reduction="sum"), len(tokens)


def _train(within: bool, steps: int = 5, known: bool = True, **settings: Any) -> tuple[Updater, list[float]]:
    updater = Updater(_Model(), TrainSection(**{**SETTINGS, **settings, "optimizer_in_backward": within}), 10)
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randint(0, 50, (20,), generator=generator) for _ in range(steps)]
    denominator = 20 if known else None
    done = [updater.step(i, [batch], _loss, denominator=denominator, describe=str) for i, batch in enumerate(batches)]
    return updater, [update.loss for update in done] + [update.grad_norm for update in done]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
@pytest.mark.parametrize("known", [True, False])
def test_it_is_the_ordinary_optimizer_bit_for_bit(optimizer: str, known: bool) -> None:
    (after, numbers), (within, others) = (_train(flag, optimizer=optimizer, known=known) for flag in (False, True))
    assert others == pytest.approx(numbers, rel=1e-6)  # the norms are summed in another order
    assert others[:5] == numbers[:5]
    for (name, parameter), other in zip(after.module.named_parameters(), within.module.parameters(), strict=True):
        assert torch.equal(parameter, other), name
        for key, value in after.optimizer.state.get(parameter, {}).items():
            held = within.optimizer.state[other][key]
            assert torch.equal(held, value) if isinstance(value, torch.Tensor) else held == value, (name, key)


def test_a_gradient_is_gone_when_the_next_is_made() -> None:
    model = _Model()
    updater = Updater(model, TrainSection(**SETTINGS, optimizer_in_backward=True), 10)
    most = 0

    def look(*_: object) -> None:
        nonlocal most
        most = max(most, sum(parameter.grad is not None for parameter in model.parameters()))

    handle = updater.optimizer.register_step_pre_hook(look)
    updater.step(0, [torch.arange(20)], _loss, denominator=20, describe=str)
    handle.remove()
    assert most == 1
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(updater.optimizer.param_groups) == 2
    model(torch.arange(20)).sum().backward()  # outside a step a gradient is left alone
    assert model.middle.weight.grad is not None


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_loss_that_is_not_finite_changes_nothing(optimizer: str) -> None:
    updater, _ = _train(True, steps=2, optimizer=optimizer)
    before = [parameter.detach().clone() for parameter in updater.module.parameters()]
    counters = [float(state["step"]) for state in updater.optimizer.state.values()]

    def bad(module: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, int]:
        total, count = _loss(module, tokens)
        return total * math.nan, count

    with pytest.raises(NonFiniteError, match="step 3: the loss is nan; nothing was updated"):
        updater.step(2, [torch.arange(20)], bad, denominator=20, describe=str)
    assert all(torch.equal(a, b) for a, b in zip(updater.module.parameters(), before, strict=True))
    assert [float(state["step"]) for state in updater.optimizer.state.values()] == counters


def test_a_gradient_that_is_not_finite_stops_its_own_update_and_those_after_it() -> None:
    model = _Model()
    updater = Updater(model, TrainSection(**SETTINGS, optimizer_in_backward=True), 10)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.middle.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(NonFiniteError, match="parameters whose gradients came before were updated, so go on from the"):
        updater.step(9, [torch.arange(20)], _loss, denominator=20, describe=str)
    assert not torch.equal(model.norm.weight, before["norm.weight"])
    for name in ("middle.weight", "embedding.weight"):
        assert torch.equal(model.get_parameter(name), before[name])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"accumulation": 2, "max_grad_norm": 0.0}, "set train.accumulation to 1"),
        ({}, "set train.max_grad_norm to 0"),
        ({"max_grad_norm": 0.0, "precision": "float16"}, "set train.precision to bfloat16 or float32"),
    ],
)
def test_what_contradicts_it_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"train.optimizer_in_backward .*{message}"):
        TrainSection(optimizer_in_backward=True, **keys)

"""AdamW by our kernel and by torch's together: torch's results, states and guard. The kernel's reference stands in."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from tunesmith.checkpoint.state import load_state, save_state
from tunesmith.kernels import adamw as kernel
from tunesmith.recipe.schema import TrainSection
from tunesmith.train import adamw, optimizers
from tunesmith.train.adamw import AdamW
from tunesmith.train.optimizers import guarded_step, make_optimizer
from tunesmith.train.states import capture_state, restore_state
from tunesmith.train.update import Updater

SETTINGS: dict[str, Any] = {"learning_rate": 0.05, "weight_decay": 0.1, "max_grad_norm": 0.5}
CPU = torch.device("cpu")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """As on a GPU with Triton: weights of more than 4 KiB go the kernel's way. The shapes of those that did."""
    shapes: list[torch.Size] = []

    def update(updated: kernel.Updated, *rest: Any) -> None:
        shapes.extend(weight.shape for weight in updated.weights)
        kernel.update(updated, *rest)

    monkeypatch.setattr(adamw, "use_kernel", lambda device: True)
    monkeypatch.setattr(optimizers, "use_kernel", lambda device: True)
    monkeypatch.setattr(adamw, "LARGE_BYTES", 4096)
    monkeypatch.setattr(adamw, "update", update)
    return shapes


class _Model(nn.Module):
    """Two large matrices, one of them tied at both ends, and small tensors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 48)
        self.middle = nn.Linear(48, 48)
        self.norm = nn.LayerNorm(48)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(torch.relu(self.middle(self.embedding(tokens))))
        return hidden @ self.embedding.weight.t()


def _loss(module: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, int]:
    return nn.functional.cross_entropy(module(tokens), tokens.flip(0), reduction="sum"), len(tokens)


def _batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 50, (20,), generator=generator) for _ in range(count)]


def _train(updater: Updater, batches: list[torch.Tensor], first: int = 0) -> list[float]:
    numbered = enumerate(batches, first)
    return [updater.step(i, [batch], _loss, denominator=20, describe=str).loss for i, batch in numbered]


def _updater(**settings: Any) -> Updater:
    return Updater(_Model(), TrainSection(**{**SETTINGS, **settings}), 20)


def test_it_follows_torchs_own(taken: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    """With clipping and weight decay; only the large weights go the kernel's way."""
    ours = _updater()
    assert isinstance(ours.optimizer, AdamW)
    monkeypatch.setattr(optimizers, "use_kernel", lambda device: False)
    theirs = _updater()
    assert isinstance(theirs.optimizer, torch.optim.AdamW) and not isinstance(theirs.optimizer, AdamW)
    assert _train(ours, _batches(10)) == pytest.approx(_train(theirs, _batches(10)), rel=1e-5)
    assert set(taken) == {torch.Size([50, 48]), torch.Size([48, 48])}
    for mine, other in zip(ours.module.parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
        assert ours.optimizer.state[mine]["step"] == 10


def test_states_are_torchs(taken: list[torch.Size]) -> None:
    """Both ways: the state of one optimiser is loaded into the other, which goes on as the first would."""
    groups: list[Any] = []
    for _ in range(4):
        generator = torch.Generator().manual_seed(1)
        weights = [nn.Parameter(torch.randn(size, generator=generator)) for size in ((64, 64), (8,))]
        groups.append([{"params": weights, "weight_decay": 0.1}])

    def stepped(optimizer: torch.optim.Optimizer, seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        return [parameter.detach().clone() for parameter in optimizer.param_groups[0]["params"]]

    makes: list[Any] = [AdamW, lambda *args, **more: torch.optim.AdamW(*args, **more, fused=True)]
    for first, second in (makes, makes[::-1]):
        left, right = first(groups.pop(), lr=0.1, betas=(0.9, 0.99)), second(groups.pop(), lr=0.1, betas=(0.9, 0.99))
        stepped_to = stepped(left, 2)
        assert left.state_dict()["state"].keys() == {0, 1}
        right.load_state_dict(deepcopy(left.state_dict()))  # loading shares the tensors
        for parameter, weight in zip(right.param_groups[0]["params"], stepped_to, strict=True):
            parameter.data.copy_(weight)
            assert set(right.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}
            assert right.state[parameter]["step"].dtype == torch.float32
        for ours, theirs in zip(stepped(left, 3), stepped(right, 3), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert taken


def test_a_stopped_step_changes_nothing(taken: list[torch.Size]) -> None:
    updater = _updater()
    _train(updater, _batches(2))
    before = {name: value.clone() for name, value in updater.module.state_dict().items()}
    states = [
        {key: value.clone() for key, value in updater.optimizer.state[parameter].items()}
        for parameter in updater.module.parameters()
    ]
    for parameter in updater.module.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    guarded_step(updater.optimizer, torch.ones(()), torch.ones(()))
    assert all(torch.equal(value, before[name]) for name, value in updater.module.state_dict().items())
    for parameter, state in zip(updater.module.parameters(), states, strict=True):
        assert all(torch.equal(updater.optimizer.state[parameter][key], value) for key, value in state.items())
    assert taken


def test_a_guard_on_the_first_step_leaves_the_first_for_later(taken: list[torch.Size]) -> None:
    parameter = nn.Parameter(torch.ones(64, 64))
    optimizer = AdamW([parameter], lr=0.1, betas=(0.9, 0.99))
    parameter.grad = torch.full_like(parameter, float("inf"))
    guarded_step(optimizer, torch.ones(()), torch.ones(()))
    assert optimizer.state[parameter]["step"] == 0
    parameter.grad = torch.ones_like(parameter)
    guarded_step(optimizer, torch.tensor(4.0), torch.zeros(()))
    torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 0.9))
    assert optimizer.state[parameter]["exp_avg"][0, 0].item() == pytest.approx(0.1 / 4)
    assert taken


def test_without_a_guard_it_is_an_ordinary_optimiser(taken: list[torch.Size]) -> None:
    parameter = nn.Parameter(torch.ones(64, 64))
    optimizer = AdamW([parameter], lr=0.1, betas=(0.9, 0.99))

    def closure() -> float:
        parameter.grad = torch.ones_like(parameter)
        return 3.5

    assert optimizer.step(closure) == 3.5
    torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 0.9))
    assert taken


def test_mixed_dtypes_take_the_kernel_however_small(taken: list[torch.Size]) -> None:
    """torch's fused update wants one dtype for a weight, its gradient and its moments."""
    parameter = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = AdamW([parameter], lr=0.125, betas=(0.9, 0.99))
    moments = {name: torch.zeros(8) for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[parameter] = {"step": torch.zeros(()), **moments}
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert taken == [torch.Size([8])]
    assert torch.equal(parameter.detach(), torch.full_like(parameter, 0.875))


def test_a_weight_that_is_no_row_of_memory_is_torchs(taken: list[torch.Size]) -> None:
    parameter = nn.Parameter(torch.ones(64, 96).t())
    optimizer = AdamW([parameter], lr=0.1, betas=(0.9, 0.99))
    parameter.grad = torch.ones(64, 96).t()
    optimizer.step()
    assert not taken
    torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 0.9))


@pytest.mark.parametrize("known", [True, False])
def test_in_the_backward_pass_it_is_the_same_bit_for_bit(known: bool, taken: list[torch.Size]) -> None:
    outcomes = []
    for within in (False, True):
        updater = _updater(optimizer_in_backward=within, max_grad_norm=0.0)
        denominator = 20 if known else None
        for number, batch in enumerate(_batches(5)):
            updater.step(number, [batch], _loss, denominator=denominator, describe=str)
        outcomes.append((updater, [p.detach() for p in updater.module.parameters()]))
    (after, expected), (inside, got) = outcomes
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    for a, b in zip(after.module.parameters(), inside.module.parameters(), strict=True):
        assert all(torch.equal(after.optimizer.state[a][k], inside.optimizer.state[b][k]) for k in ("step", "exp_avg"))
    assert len(taken) == 2 * 5 * 2


@pytest.mark.parametrize("resumed_by_torch", [False, True])
def test_a_checkpoint_goes_on_bit_for_bit(
    resumed_by_torch: bool, taken: list[torch.Size], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the file; by torch's own AdamW, as on a machine without Triton, to its rounding."""
    whole = _updater()
    batches = _batches(6)
    _train(whole, batches[:3])
    weights = dict(whole.module.named_parameters())
    saved = save_state(tmp_path, capture_state(3, weights, whole, CPU, {}), keep=1)
    expected = _train(whole, batches[3:], 3)
    monkeypatch.setattr(optimizers, "use_kernel", lambda device: not resumed_by_torch)
    again = _updater()
    restore_state(load_state(saved), dict(again.module.named_parameters()), again, CPU)
    losses = _train(again, batches[3:], 3)
    assert losses == (pytest.approx(expected, rel=1e-5) if resumed_by_torch else expected)
    assert taken


def test_elsewhere_it_is_torchs_own() -> None:
    optimizer = make_optimizer(_Model().named_parameters(), TrainSection(**SETTINGS))
    assert isinstance(optimizer, torch.optim.AdamW) and not isinstance(optimizer, AdamW)
    assert optimizer.defaults["fused"] is True

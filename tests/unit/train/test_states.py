"""From memory to a state and back: what fits, and what is refused."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tunesmith.checkpoint.state import TrainingState, load_state, save_state
from tunesmith.errors import CheckpointError, NonFiniteError
from tunesmith.recipe.schema import TrainSection
from tunesmith.train import randomness
from tunesmith.train.states import capture_state, restore_state
from tunesmith.train.update import Updater

CPU = torch.device("cpu")


def _updater(width: int = 70, **settings: object) -> Updater:
    torch.manual_seed(0)
    return Updater(nn.Linear(width, width), TrainSection(**settings), 10)


def _step(updater: Updater, number: int) -> float:
    def loss(module: nn.Module, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        return module(rows + torch.randn_like(rows)).square().sum(), rows.numel()

    return updater.step(number, [torch.ones(4, 70)], loss, denominator=None, describe=str).loss


def _saved(updater: Updater, folder: Path, step: int) -> TrainingState:
    weights = dict(updater.module.named_parameters())
    return load_state(save_state(folder, capture_state(step, weights, updater, CPU, {"own": 1}), keep=1))


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_restored_updater_goes_on_the_same(tmp_path: Path, optimizer: str, precision: str) -> None:
    straight = _updater(optimizer=optimizer, precision=precision)
    _step(straight, 0)
    state = _saved(straight, tmp_path, 1)
    if straight.scaler is not None:
        assert state.facts["scaler"]["quiet_steps"] == 1
    expected = [_step(straight, number) for number in (1, 2)]
    other = _updater(optimizer=optimizer, precision=precision)
    torch.manual_seed(99)
    restore_state(state, dict(other.module.named_parameters()), other, CPU)
    assert [_step(other, number) for number in (1, 2)] == expected
    assert other.scaler == straight.scaler


def test_every_generator_comes_back(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.random(), random.gauss(0, 1), float(np.random.rand()), torch.rand(()).item()

    randomness.seed_everything(3)
    random.gauss(0, 1)  # leaves the second of a pair behind
    np.random.randn()
    tensors, facts = randomness.capture(CPU)
    expected = draw()
    randomness.seed_everything(4)
    randomness.restore(tensors, facts, CPU)
    assert draw() == expected


def test_a_state_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    state = _saved(_updater(), tmp_path, 1)
    small = _updater(width=8)
    with pytest.raises(CheckpointError, match=r"weight is \(70, 70\) torch.float32 there, \(8, 8\)"):
        restore_state(state, dict(small.module.named_parameters()), small, CPU)
    renamed = {f"inner.{name}": tensor for name, tensor in small.module.named_parameters()}
    with pytest.raises(CheckpointError, match="another model or method: bias"):
        restore_state(state, renamed, small, CPU)


def test_a_state_with_a_weight_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    """Was: the last update could overflow, and the broken weights were saved and exported as a finished run."""
    updater = _updater(learning_rate=1e20, weight_decay=1e20)
    _step(updater, 5)
    with pytest.raises(NonFiniteError, match="made weight NaN or infinite"):
        _saved(updater, tmp_path, 7)
    assert not list(tmp_path.iterdir())

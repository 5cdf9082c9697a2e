"""One optimiser step: what is refused, clipped, scaled and skipped."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tunesmith.errors import NonFiniteError, RecipeError
from tunesmith.recipe.schema import TrainSection
from tunesmith.train.optimizers import make_optimizer, parameter_groups
from tunesmith.train.scaler import SMALLEST, LossScaler
from tunesmith.train.update import Updater, clip_factor, global_norm


class Line(nn.Module):
    """y = w x, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[2.0]]))


def _loss(module: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
    assert isinstance(module, Line)
    return (batch * module.weight.sum()).sum(), batch.numel()


def _updater(**settings: object) -> Updater:
    base = {"optimizer": "sgd", "learning_rate": 0.5, "schedule": "constant", "warmup_ratio": 0.0}
    return Updater(Line(), TrainSection(**{**base, **settings}), 10)


def _weight(updater: Updater) -> float:
    assert isinstance(updater.module, Line)
    return updater.module.weight.item()


@pytest.mark.parametrize("known", [True, False])
def test_ragged_window_is_one_mean_over_all_items(known: bool) -> None:
    updater = _updater(max_grad_norm=0.0)
    window = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([6.0])]
    update = updater.step(0, window, _loss, denominator=4 if known else None, describe=str)
    assert update.loss == pytest.approx(2.0 * 3.0)  # weight 2, mean of the inputs 3
    assert update.grad_norm == pytest.approx(3.0)
    assert _weight(updater) == pytest.approx(2.0 - 0.5 * 3.0)


def test_gradient_is_clipped_to_the_limit() -> None:
    updater = _updater(max_grad_norm=1.0)
    update = updater.step(0, [torch.tensor([4.0])], _loss, denominator=1, describe=str)
    assert update.grad_norm == pytest.approx(4.0)  # as it was before
    assert _weight(updater) == pytest.approx(2.0 - 0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_batch(bad: float) -> None:
    updater = _updater()
    window = [torch.tensor([1.0]), torch.tensor([bad])]
    with pytest.raises(NonFiniteError, match=r"step 7: the loss is (nan|inf); nothing was updated. Batch: row 3\."):
        updater.step(6, window, _loss, denominator=2, describe=lambda b: "row 3" if not b.isfinite().all() else "row 1")
    assert _weight(updater) == 2.0


def test_a_gradient_that_is_not_finite_stops_before_the_update() -> None:
    def loss(module: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
        return torch.sqrt(module.weight.sum() - 2.0), 1  # finite, with an infinite slope

    updater = _updater()
    with pytest.raises(NonFiniteError, match="the gradient norm is inf"):
        updater.step(0, [torch.ones(1)], loss, denominator=1, describe=lambda _: "row 1")
    assert _weight(updater) == 2.0


def test_float16_overflow_skips_the_step_and_halves_the_scale() -> None:
    updater = _updater(precision="float16", max_grad_norm=0.0)
    assert updater.scaler is not None
    updater.scaler.scale = 2.0**24

    def loss(module: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
        # In float16, as a model's activations are: the scaled gradient overflows at first.
        return (batch.half() * module.weight.half().sum()).sum().float(), batch.numel()

    skipped = 0
    for step in range(20):
        update = updater.step(step, [torch.tensor([1.0])], loss, denominator=1, describe=str)
        if not update.skipped:
            break
        skipped += 1
        assert _weight(updater) == 2.0
    assert skipped == updater.scaler.skipped_steps == 9  # 2^24 to 2^15, the largest power of two in float16
    assert updater.scaler.scale == 2.0**15
    assert update.grad_norm == pytest.approx(1.0)
    assert _weight(updater) == pytest.approx(1.5)


def test_scaler_grows_after_a_quiet_stretch_and_gives_up_at_the_bottom() -> None:
    scaler = LossScaler(scale=4.0, growth_interval=3)
    for _ in range(3):
        scaler.update(overflow=False)
    assert (scaler.scale, scaler.quiet_steps) == (8.0, 0)
    with pytest.raises(NonFiniteError, match="overflow float16"):
        for _ in range(100):
            scaler.update(overflow=True)
    assert scaler.scale < SMALLEST


def test_global_norm_and_clip_factor() -> None:
    parts = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]], dtype=torch.bfloat16)]
    assert global_norm(parts).item() == pytest.approx(5.0)
    assert clip_factor(5.0, 1.0) == pytest.approx(0.2)
    assert clip_factor(0.5, 1.0) == 1.0
    assert clip_factor(5.0, 0.0) == 1.0


def test_matrices_decay_and_vectors_do_not() -> None:
    module = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2), nn.LayerNorm(2))
    module[1].bias.requires_grad_(False)
    groups = parameter_groups(module.named_parameters(), 0.1)
    assert [(g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in groups] == [
        (0.1, [(4, 3), (2, 3)]),
        (0.0, [(2,), (2,)]),
    ]


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "sgd"])
def test_every_optimizer_lowers_a_loss(kind: str) -> None:
    torch.manual_seed(0)
    module = nn.Linear(70, 70)
    updater = Updater(module, TrainSection(optimizer=kind, learning_rate=0.05, weight_decay=0.01), 30)
    batch = torch.randn(32, 70)

    def loss(model: nn.Module, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        return (model(rows) - rows.flip(1)).square().sum(), rows.numel()

    losses = [updater.step(i, [batch], loss, denominator=None, describe=str).loss for i in range(30)]
    assert losses[-1] < 0.9 * losses[0]


def test_nothing_to_train_is_refused() -> None:
    module = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(RecipeError, match="every parameter is frozen"):
        make_optimizer(module.named_parameters(), TrainSection())

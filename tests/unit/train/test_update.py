"""One optimiser step: what is refused, clipped, scaled and skipped."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tunesmith.errors import NonFiniteError, RecipeError
from tunesmith.recipe.schema import TrainSection
from tunesmith.train.guard import gradient_divisor
from tunesmith.train.optimizers import make_optimizer, parameter_groups
from tunesmith.train.scaler import SMALLEST, LossScaler
from tunesmith.train.update import PendingUpdate, Updater, global_norm


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


def test_global_norm() -> None:
    parts = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]], dtype=torch.bfloat16)]
    assert global_norm(parts).item() == pytest.approx(5.0)
    assert global_norm([]).item() == 0.0


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


class _Slope(nn.Module):
    """y = w x for many weights, so that 8-bit states are used."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 5000))


def _slope_loss(module: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
    assert isinstance(module, _Slope)
    return (module.weight.square().sum() * batch).sum(), batch.numel()


def _snapshot(updater: Updater) -> list[torch.Tensor | int]:
    states = [value for state in updater.optimizer.state.values() for value in state.values()]
    held = [*updater.module.parameters(), *states]
    return [value.detach().clone() if isinstance(value, torch.Tensor) else value for value in held]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_step_and_those_queued_after_it_change_nothing(
    monkeypatch: pytest.MonkeyPatch, optimizer: str, bad: float
) -> None:
    monkeypatch.setattr("tunesmith.train.update.reads_late", lambda device: True)
    updater = Updater(_Slope(), TrainSection(optimizer=optimizer, learning_rate=0.1), 10)

    def submit(number: int, value: float) -> PendingUpdate:
        batch = torch.tensor([value])
        return updater.submit(number, [batch], _slope_loss, denominator=1, describe=lambda b: f"value {b.item()}")

    first = submit(0, 1.0)
    assert not first.is_ready
    second = submit(1, 1.0)
    assert first.read().loss > second.read().loss
    before = _snapshot(updater)
    failing, following, after = submit(2, bad), submit(3, 1.0), submit(4, 1.0)
    with pytest.raises(NonFiniteError, match=r"step 3: the loss is (nan|inf); nothing was updated. Batch: value"):
        failing.read()
    for now, then in zip(_snapshot(updater), before, strict=True):
        assert torch.equal(now, then) if isinstance(now, torch.Tensor) else now == then
    for late in (following, after):
        with pytest.raises(NonFiniteError, match="an earlier step was not finite, and nothing was updated since"):
            late.read()
    updater.forget_failure()
    submit(2, 1.0).read()
    assert not torch.equal(_snapshot(updater)[0], before[0])


def test_after_an_error_that_was_waited_for_steps_go_on() -> None:
    updater = _updater()
    with pytest.raises(NonFiniteError):
        updater.step(0, [torch.tensor([math.nan])], _loss, denominator=1, describe=str)
    updater.step(1, [torch.tensor([1.0])], _loss, denominator=1, describe=str)
    assert _weight(updater) != 2.0


def test_8_bit_counters_go_back_after_a_float16_overflow() -> None:
    settings = TrainSection(optimizer="adamw8bit", precision="float16", learning_rate=0.1)
    updater = Updater(_Slope(), settings, 10)

    def overflowing(module: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
        assert isinstance(module, _Slope)
        return torch.sqrt(module.weight - module.weight.detach()).sum(), 1  # 0, with an infinite slope

    assert updater.step(0, [torch.ones(1)], overflowing, denominator=1, describe=str).skipped
    (state,) = updater.optimizer.state.values()
    assert state["step"] == 0
    assert not updater.step(1, [torch.ones(1)], _slope_loss, denominator=1, describe=str).skipped
    assert state["step"] == 1


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "sgd"])
def test_clipping_by_the_divisor_is_clipping_of_the_gradient(optimizer: str) -> None:
    """Against gradients that are clipped before the optimiser sees them."""
    settings = TrainSection(optimizer=optimizer, learning_rate=0.1, schedule="constant", warmup_ratio=0.0)
    updater, plain = Updater(_Slope(), settings, 10), _Slope()
    reference = make_optimizer(plain.named_parameters(), settings)
    for step in range(5):
        updater.step(step, [torch.tensor([2.0])], _slope_loss, denominator=None, describe=str)
        reference.zero_grad()
        _slope_loss(plain, torch.tensor([2.0]))[0].backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        assert norm > 1
        reference.step()
    assert isinstance(updater.module, _Slope)
    torch.testing.assert_close(updater.module.weight, plain.weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("raw", "divisor", "limit", "expected"), [(8.0, 2.0, 1.0, 8.0), (8.0, 2.0, 5.0, 2.0), (8.0, 2.0, 0.0, 2.0)]
)
def test_gradient_divisor(raw: float, divisor: float, limit: float, expected: float) -> None:
    """A norm of 4 after the division: brought down to the limit, or left as it is."""
    assert gradient_divisor(torch.tensor(raw), divisor, limit).item() == expected

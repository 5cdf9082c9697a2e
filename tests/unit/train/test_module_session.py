"""The loop on a plain module: learning, resuming bit for bit, a full disk, signals."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from tunesmith.checkpoint.state import list_states
from tunesmith.errors import DataError, NonFiniteError, TrainingError
from tunesmith.recipe.schema import CheckpointSection, EvaluationSection, TrainSection
from tunesmith.rundir.io import read_jsonl
from tunesmith.train import loop as loop_module
from tunesmith.train.loop import Hooks
from tunesmith.train.metrics import StepMetrics
from tunesmith.train.module_session import fit
from tunesmith.train.stopping import exit_code

SETTINGS = TrainSection(epochs=4, accumulation=2, learning_rate=0.02, seed=5, optimizer="adamw")
Rows = tuple[torch.Tensor, torch.Tensor]


def _module() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 1))


def _batches(count: int = 5) -> list[Rows]:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(count, 8, 6, generator=generator)
    return [(x, x.sum(1, keepdim=True)) for x in inputs]


def _loss(module: nn.Module, batch: Rows) -> tuple[torch.Tensor, int]:
    return (module(batch[0]) - batch[1]).square().sum(), len(batch[0])


def _losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_jsonl(run / "metrics.jsonl") if row["event"] == "step"]


def test_it_learns_and_validates(tmp_path: Path) -> None:
    batches = _batches()
    settings = SETTINGS.model_copy(update={"epochs": 30.0})
    result = fit(_module(), batches, _loss, run_dir=tmp_path, settings=settings, validation=batches[:2])
    losses = [loss for _, loss in _losses(tmp_path)]
    assert len(losses) == 30 * 3  # 5 batches, 2 at a time: the last window of an epoch is ragged
    assert losses[-1] < 0.5 * losses[0]
    validations = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if row["event"] == "validation"]
    assert len(validations) == 10  # epochs of three steps are not validated each
    assert result.validation is not None
    assert result.validation.loss < 0.5 * validations[0]["validation_loss"]
    assert result.bottleneck in ("data", "device")


class _StopError(Exception):
    pass


def _stop_after(step: int) -> Hooks:
    def on_step(metrics: StepMetrics) -> None:
        if metrics.step == step:
            raise _StopError

    return Hooks(on_step=on_step)


def test_a_resumed_run_has_the_same_losses_and_weights_bit_for_bit(tmp_path: Path) -> None:
    """Dropout, batch norm's buffers and AdamW's moments all have to come back."""
    whole, cut = _module(), _module()
    fit(whole, _batches(), _loss, run_dir=tmp_path / "whole", settings=SETTINGS)
    every = CheckpointSection(every_steps=2)
    with pytest.raises(_StopError):
        fit(cut, _batches(), _loss, run_dir=tmp_path / "cut", settings=SETTINGS, checkpoint=every, hooks=_stop_after(7))
    assert len(_losses(tmp_path / "cut")) == 7
    fresh = _module()
    fit(fresh, _batches(), _loss, run_dir=tmp_path / "cut", settings=SETTINGS, checkpoint=every)
    assert _losses(tmp_path / "cut") == _losses(tmp_path / "whole")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_its_own_code(tmp_path: Path, number: signal.Signals) -> None:
    def on_step(metrics: StepMetrics) -> None:
        if metrics.step == 3:
            os.kill(os.getpid(), number)

    said: list[str] = []
    hooks = Hooks(on_step=on_step, on_warning=said.append)
    before = signal.getsignal(number)
    result = fit(_module(), _batches(), _loss, run_dir=tmp_path, settings=SETTINGS, hooks=hooks)
    assert signal.getsignal(number) is before
    assert (result.steps, result.stopped_by) == (3, number)
    assert exit_code(result.stopped_by) == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert [path.name for path in list_states(tmp_path / "checkpoints")] == ["step-00000003"]
    assert number.name in said[0]


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def on_step(metrics: StepMetrics) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    hooks = Hooks(on_step=on_step, on_warning=lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        fit(_module(), _batches(), _loss, run_dir=tmp_path, settings=SETTINGS, hooks=hooks)
    assert list_states(tmp_path / "checkpoints") == []


def _fail_saves(monkeypatch: pytest.MonkeyPatch, failing: set[int]) -> None:
    original = loop_module.save_state

    def save(checkpoints: Path, state: object, *, keep: int) -> Path:
        if state.step in failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(checkpoints, state, keep=keep)

    monkeypatch.setattr(loop_module, "save_state", save)


def test_a_full_disk_in_the_middle_costs_a_checkpoint_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_saves(monkeypatch, {4, 6})
    said: list[str] = []
    result = fit(
        _module(),
        _batches(),
        _loss,
        run_dir=tmp_path,
        settings=SETTINGS,
        checkpoint=CheckpointSection(every_steps=2),
        hooks=Hooks(on_warning=said.append),
    )
    assert result.steps == 12
    assert result.failed_saves == [4, 6]
    assert "step-00000002; training goes on" in said[0]
    assert [path.name for path in list_states(tmp_path / "checkpoints")] == ["step-00000010", "step-00000012"]


def test_a_full_disk_at_the_end_is_an_error_that_names_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fail_saves(monkeypatch, {12})
    with pytest.raises(TrainingError, match=r"No space left.*step-00000010: free space, then go on with"):
        fit(
            _module(),
            _batches(),
            _loss,
            run_dir=tmp_path,
            settings=SETTINGS,
            checkpoint=CheckpointSection(every_steps=5),
        )


def test_nan_stops_before_the_update(tmp_path: Path) -> None:
    batches = _batches()
    batches[4][0][0, 0] = float("nan")
    module = _module()
    with pytest.raises(NonFiniteError, match="step 3: the loss is nan"):
        fit(module, batches, _loss, run_dir=tmp_path, settings=SETTINGS)
    assert all(tensor.isfinite().all() for name, tensor in module.named_parameters())


def test_no_batches_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no batch"):
        fit(_module(), [], _loss, run_dir=tmp_path, settings=SETTINGS)


def test_validation_can_follow_steps(tmp_path: Path) -> None:
    fit(
        _module(),
        lambda epoch: _batches(),
        _loss,
        run_dir=tmp_path,
        settings=SETTINGS,
        validation=_batches()[:1],
        evaluation=EvaluationSection(every_steps=5),
    )
    steps = [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl") if row["event"] == "validation"]
    assert steps == [5, 10, 12]


def test_a_validation_that_counts_nothing_is_refused(tmp_path: Path) -> None:
    """It ended in a division by zero."""

    def loss(module: nn.Module, batch: Rows) -> tuple[torch.Tensor, int]:
        total, count = _loss(module, batch)
        return total, count if module.training else 0

    with pytest.raises(DataError, match="no item of the validation"):
        fit(_module(), _batches(), loss, run_dir=tmp_path, settings=SETTINGS, validation=_batches(1))

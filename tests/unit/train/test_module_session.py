"""The loop on a plain module: learning, resuming bit for bit, a full disk, signals."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tunesmith.checkpoint.state import list_states
from tunesmith.errors import DataError, NonFiniteError, RecipeError, TrainingError
from tunesmith.recipe.schema import CheckpointSection, EvaluationSection, TrainSection
from tunesmith.rundir.io import read_jsonl
from tunesmith.rundir.layout import RunDir
from tunesmith.train import together as together_module
from tunesmith.train.loop import Hooks, LoopResult, _disk_full_message
from tunesmith.train.metrics import StepMetrics
from tunesmith.train.module_session import fit
from tunesmith.train.stopping import exit_code
from tunesmith.train.windows import BatchWindows

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


def _drawn(epoch: int) -> list[Rows]:
    """Batches from the global generators, as a data loader shuffles and augments."""
    assert threading.current_thread() is threading.main_thread()
    rows = [(x + 0.1 * torch.randn(x.shape) + random.random(), y * float(np.random.rand())) for x, y in _batches()]
    random.shuffle(rows)
    return rows


def test_batches_drawn_from_the_global_generators_are_the_same_when_resumed(tmp_path: Path) -> None:
    """They were drawn in the background, between the draws of the module's own dropout."""
    whole, cut = _module(), _module()
    fit(whole, _drawn, _loss, run_dir=tmp_path / "whole", settings=SETTINGS)
    every = CheckpointSection(every_steps=1)
    for stop in (2, 7):  # in the middle of the first epoch, at the first step of the third
        with pytest.raises(_StopError):
            fit(
                cut,
                _drawn,
                _loss,
                run_dir=tmp_path / "cut",
                settings=SETTINGS,
                checkpoint=every,
                hooks=_stop_after(stop),
            )
        cut = _module()
    fit(cut, _drawn, _loss, run_dir=tmp_path / "cut", settings=SETTINGS)
    assert _losses(tmp_path / "cut") == _losses(tmp_path / "whole")
    assert len(set(_losses(tmp_path / "whole"))) == 12
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, cut.state_dict()[name]), name


def test_epochs_draw_different_batches() -> None:
    windows = BatchWindows(_drawn, SETTINGS, torch.device("cpu"))
    first, second = windows.take(0)[0].batches[0], windows.take(3)[0].batches[0]
    windows.close()
    assert not torch.equal(first[0], second[0])
    before = torch.get_rng_state()
    again = BatchWindows(_drawn, SETTINGS, torch.device("cpu"))
    assert torch.equal(again.take(3)[0].batches[0][0], second[0])
    again.close()
    assert torch.equal(torch.get_rng_state(), before)


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
    original = together_module.save_state

    def save(checkpoints: Path, state: object, *, keep: int) -> Path:
        if state.step in failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(checkpoints, state, keep=keep)

    monkeypatch.setattr(together_module, "save_state", save)


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
    """Also a bug: it named `tunesmith train --resume`, which knows recipes, and of another process's its own folder."""
    _fail_saves(monkeypatch, {12})
    with pytest.raises(TrainingError, match=r"No space left.*step-00000010: free space, then start the same program"):
        fit(
            _module(),
            _batches(),
            _loss,
            run_dir=tmp_path,
            settings=SETTINGS,
            checkpoint=CheckpointSection(every_steps=5),
        )


def test_the_run_of_all_processes_is_what_goes_on(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    error = OSError(errno.ENOSPC, "No space left on device")
    said = _disk_full_message(RunDir(tmp_path / "ranks" / "rank-1"), tmp_path / "checkpoints", error)
    assert said.endswith(f"step-00000003: free space, then go on with: tunesmith train --resume {tmp_path}")


def test_nan_stops_before_the_update(tmp_path: Path) -> None:
    batches = _batches()
    batches[4][0][0, 0] = float("nan")
    module = _module()
    with pytest.raises(NonFiniteError, match="step 3: the loss is nan"):
        fit(module, batches, _loss, run_dir=tmp_path, settings=SETTINGS)
    assert all(tensor.isfinite().all() for name, tensor in module.named_parameters())


def test_a_module_without_shapes_is_refused_in_one_line(tmp_path: Path) -> None:
    """A lazy module's was a traceback from its first parameter's device, an empty one's a StopIteration."""
    lazy = nn.Sequential(nn.LazyLinear(16), nn.Linear(16, 1))
    with pytest.raises(RecipeError, match=r"0\.weight has no shape yet: .* call the module on a batch before fit"):
        fit(lazy, _batches(), _loss, run_dir=tmp_path / "run", settings=SETTINGS)
    with pytest.raises(RecipeError, match="the module has no parameters"):
        fit(nn.ReLU(), _batches(), _loss, run_dir=tmp_path / "run", settings=SETTINGS)
    lazy(_batches()[0][0])
    assert fit(lazy, _batches(), _loss, run_dir=tmp_path / "run", settings=SETTINGS).steps > 0


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


def _late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: a step's numbers are read while the next one runs."""
    monkeypatch.setattr("tunesmith.train.update.reads_late", lambda device: True)


def test_reading_late_changes_no_number_and_no_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(run: Path) -> list[tuple[object, ...]]:
        keys = ("event", "step", "epoch", "loss", "grad_norm", "learning_rate", "tokens_seen", "validation_loss")
        return [tuple(row.get(key) for key in keys) for row in read_jsonl(run / "metrics.jsonl")]

    more = {
        "settings": SETTINGS,
        "validation": _batches()[:1],
        "evaluation": EvaluationSection(every_steps=5),
        "checkpoint": CheckpointSection(every_steps=4),
    }
    fit(_module(), _batches(), _loss, run_dir=tmp_path / "at once", **more)
    _late(monkeypatch)
    heard: list[int] = []
    hooks = Hooks(on_step=lambda metrics: heard.append(metrics.step))
    result = fit(_module(), _batches(), _loss, run_dir=tmp_path / "late", hooks=hooks, **more)
    assert rows(tmp_path / "late") == rows(tmp_path / "at once")
    assert heard == list(range(1, 13))
    assert result.steps == 12
    states = [
        [(path / "tensors.safetensors").read_bytes() for path in list_states(tmp_path / run / "checkpoints")]
        for run in ("at once", "late")
    ]
    assert states[0] == states[1]


def test_read_late_a_run_that_was_cut_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _late(monkeypatch)
    whole, fresh = _module(), _module()
    every = CheckpointSection(every_steps=2)
    fit(whole, _batches(), _loss, run_dir=tmp_path / "whole", settings=SETTINGS)
    with pytest.raises(_StopError):
        fit(
            _module(),
            _batches(),
            _loss,
            run_dir=tmp_path / "cut",
            settings=SETTINGS,
            checkpoint=every,
            hooks=_stop_after(7),
        )
    fit(fresh, _batches(), _loss, run_dir=tmp_path / "cut", settings=SETTINGS, checkpoint=every)
    assert _losses(tmp_path / "cut") == _losses(tmp_path / "whole")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name


def test_read_late_a_nan_is_named_and_nothing_after_it_is_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 5 is the first with the bad batch; step 6 was queued before that was known."""
    _late(monkeypatch)
    module = _module()
    states: list[list[torch.Tensor]] = []

    def of_epoch(epoch: int) -> list[Rows]:
        batches = _batches()
        if epoch == 1:
            batches[2][0][0, 0] = float("nan")
        return batches

    def on_step(metrics: StepMetrics) -> None:
        states.append([parameter.detach().clone() for parameter in module.parameters()])

    with pytest.raises(NonFiniteError, match="step 5: the loss is nan; nothing was updated"):
        fit(module, of_epoch, _loss, run_dir=tmp_path, settings=SETTINGS, hooks=Hooks(on_step=on_step))
    assert [step for step, _ in _losses(tmp_path)] == [1, 2, 3, 4]
    for parameter, last in zip(module.parameters(), states[-1], strict=True):
        assert torch.equal(parameter, last)


def test_read_late_a_failing_step_leaves_the_row_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _late(monkeypatch)
    calls = 0

    def loss(module: nn.Module, batch: Rows) -> tuple[torch.Tensor, int]:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise DataError("this row is broken")
        return _loss(module, batch)

    with pytest.raises(DataError, match="this row is broken"):
        fit(_module(), _batches(), loss, run_dir=tmp_path, settings=SETTINGS)
    assert [step for step, _ in _losses(tmp_path)] == [1, 2, 3]


def test_read_late_a_signal_ends_with_the_step_that_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _late(monkeypatch)

    def on_step(metrics: StepMetrics) -> None:
        if metrics.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    hooks = Hooks(on_step=on_step, on_warning=lambda _: None)
    result = fit(_module(), _batches(), _loss, run_dir=tmp_path, settings=SETTINGS, hooks=hooks)
    assert (result.steps, result.stopped_by) == (2, signal.SIGTERM)
    assert [path.name for path in list_states(tmp_path / "checkpoints")] == ["step-00000002"]
    assert [step for step, _ in _losses(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("waited_s", "bottleneck", "verdict"),
    [
        (0.001, "device", "data never made the device wait (0.01% of the steps' time)"),
        (0.5, "device", "the device waited 5.0% of the steps' time for data"),
        (2.5, "data", "the device waited 25.0% of the steps' time for data: batches are made by one thread"),
    ],
)
def test_verdict_on_the_data(waited_s: float, bottleneck: str, verdict: str) -> None:
    result = LoopResult(3, duration_s=10.0, data_wait_s=waited_s)
    assert result.bottleneck == bottleneck
    assert result.data_verdict is not None
    assert result.data_verdict.startswith(verdict)
    assert LoopResult(0).data_verdict is None

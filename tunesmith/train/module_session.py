"""Any torch module as something the loop can train."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import torch
from torch import Tensor, nn

from tunesmith.checkpoint.state import TrainingState
from tunesmith.errors import DataError
from tunesmith.recipe.schema import CheckpointSection, EvaluationSection, LogSection, TrainSection
from tunesmith.rundir.layout import RunDir
from tunesmith.train import randomness
from tunesmith.train.loop import Hooks, LoopResult, resume, run_loop
from tunesmith.train.metrics import EvalMetrics, StepMetrics
from tunesmith.train.order import auto_epochs
from tunesmith.train.prefetch import Prefetcher
from tunesmith.train.states import capture_state, restore_state
from tunesmith.train.update import Batch, LossFunction, Updater
from tunesmith.units import ceil_div


@dataclass(frozen=True)
class _Window(Generic[Batch]):
    batches: tuple[Batch, ...]
    epoch_position: float
    ends_epoch: bool


class ModuleSession(Generic[Batch]):
    """A module, its batches and its loss; see `fit`."""

    def __init__(
        self,
        module: nn.Module,
        batches: Callable[[int], Sequence[Batch]],
        loss: LossFunction[Batch],
        settings: TrainSection,
        validation: Sequence[Batch],
    ) -> None:
        self.module, self.loss, self.settings, self.validation = module, loss, settings, validation
        self._batches = batches
        self._epoch: tuple[int, Sequence[Batch]] = (0, batches(0))
        if len(self._epoch[1]) == 0:
            raise DataError("there is no batch to train on: `batches` is empty")
        self._steps_per_epoch = ceil_div(len(self._epoch[1]), settings.accumulation)
        self.total_steps = settings.max_steps or math.ceil(
            auto_epochs(settings, self._steps_per_epoch) * self._steps_per_epoch
        )
        self.updater = Updater(module, settings, self.total_steps)
        self.device = next(module.parameters()).device
        self.step_number = self.items_seen = 0
        self.epoch_ended = False
        self._prefetcher: Prefetcher[_Window[Batch]] | None = None

    def step(self) -> StepMetrics:
        """One optimiser step. Raises: NonFiniteError before the update when the loss or a gradient is NaN or Inf."""
        began = time.perf_counter()
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._window, self.step_number, self.total_steps)
        window, wait_s = self._prefetcher.take()
        self.module.train()
        update = self.updater.step(
            self.step_number,
            window.batches,
            self.loss,
            denominator=None,
            describe=lambda _: f"of step {self.step_number + 1}",
        )
        self.step_number += 1
        self.items_seen += update.count
        self.epoch_ended = window.ends_epoch
        return StepMetrics(
            step=self.step_number,
            epoch=window.epoch_position,
            loss=update.loss,
            grad_norm=update.grad_norm,
            learning_rate=update.learning_rate,
            tokens=update.count,
            trained_tokens=update.count,
            samples=update.count,
            duration_s=time.perf_counter() - began,
            data_wait_s=wait_s,
            tokens_seen=self.items_seen,
            micro_batches=len(window.batches),
            skipped=update.skipped,
            loss_scale=None if self.updater.scaler is None else self.updater.scaler.scale,
        )

    def evaluate(self) -> EvalMetrics | None:
        """The mean loss over the validation batches; None where there are none."""
        if not self.validation:
            return None
        began = time.perf_counter()
        total, count = 0.0, 0
        self.module.eval()
        with torch.no_grad():
            for batch in self.validation:
                loss, items = self.loss(self.module, batch)
                total, count = total + float(loss), count + items
        if count == 0:
            raise DataError("no item of the validation batches is counted in the loss")
        mean = total / count
        return EvalMetrics(
            self.step_number, mean, math.exp(min(mean, 700.0)), count, count, time.perf_counter() - began
        )

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        return dict(self.module.state_dict(keep_vars=True))

    def state(self) -> TrainingState:
        """The complete state after the steps done so far."""
        facts = {"tokens_seen": self.items_seen, "total_steps": self.total_steps}
        return capture_state(self.step_number, self.weights(), self.updater, self.device, facts)

    def restore(self, state: TrainingState) -> None:
        """Go on from `state` as if there had been no stop."""
        self.close()
        restore_state(state, self.weights(), self.updater, self.device)
        self.step_number, self.items_seen = state.step, int(state.facts["tokens_seen"])

    def close(self) -> None:
        """Stop the background thread; a later step starts it again."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def _window(self, step: int) -> _Window[Batch]:
        epoch, index = divmod(step, self._steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._batches(epoch))
        width = self.settings.accumulation
        batches = self._epoch[1]
        # Sliced by index: a sequence that makes its batches on demand need not know slices.
        chosen = range(index * width, min((index + 1) * width, len(batches)))
        ends = index + 1 == self._steps_per_epoch
        return _Window(tuple(batches[i] for i in chosen), epoch + (index + 1) / self._steps_per_epoch, ends)


def fit(
    module: nn.Module,
    batches: Sequence[Batch] | Callable[[int], Sequence[Batch]],
    loss: LossFunction[Batch],
    *,
    run_dir: Path,
    settings: TrainSection,
    validation: Sequence[Batch] = (),
    evaluation: EvaluationSection | None = None,
    checkpoint: CheckpointSection | None = None,
    log: LogSection | None = None,
    hooks: Hooks | None = None,
) -> LoopResult:
    """Train any module with the loop that trains language models: same metrics, checkpoints, resumption and signals.

    The gradient of a step is that of (sum of losses) / (number of items) over its `settings.accumulation` batches.
    A `run_dir` that holds a checkpoint is gone on with, bit for bit on a CPU.

    Args:
        batches: the batches of an epoch (every epoch as long as the first), or a function from the epoch to them.
        loss: loss(module, batch) -> (sum of the losses, number of items), the sum a float32 scalar.
        validation: batches that `loss` is averaged over without training, once an epoch (ten times in all where epochs
            are under 20 steps) unless `evaluation` says else.
    """
    of_epoch = batches if callable(batches) else lambda _: batches
    randomness.seed_everything(settings.seed)
    session = ModuleSession(module, of_epoch, loss, settings, validation)
    run = RunDir(run_dir)
    run.path.mkdir(parents=True, exist_ok=True)
    resume(session, run)
    return run_loop(
        session,
        run,
        evaluation=evaluation or EvaluationSection(),
        checkpoint=checkpoint or CheckpointSection(),
        log=log or LogSection(),
        hooks=hooks or Hooks(),
    )

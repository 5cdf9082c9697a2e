"""Any torch module as something the loop can train."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic

import torch
from torch import Tensor, nn

from tunesmith.checkpoint.state import TrainingState
from tunesmith.errors import DataError
from tunesmith.recipe.schema import CheckpointSection, EvaluationSection, LogSection, TrainSection
from tunesmith.rundir.layout import RunDir
from tunesmith.train import randomness
from tunesmith.train.clock import StepClock
from tunesmith.train.loop import Hooks, LoopResult, resume, run_loop
from tunesmith.train.metrics import EvalMetrics, StepMetrics, step_metrics
from tunesmith.train.pending import Pending
from tunesmith.train.states import capture_state, restore_state
from tunesmith.train.update import Batch, LossFunction, Updater
from tunesmith.train.windows import BatchWindows


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
        self.device = next(module.parameters()).device
        self.windows = BatchWindows(batches, settings, self.device)
        self.total_steps = self.windows.total_steps
        self.updater = Updater(module, settings, self.total_steps)
        self.step_number = self.items_seen = 0
        self.epoch_position, self.epoch_ended = 0.0, False
        self.clock = StepClock(self.device)

    def submit(self) -> Pending[StepMetrics]:
        """Queue one optimiser step. Reading it raises: NonFiniteError when the loss or a gradient is NaN or Inf."""
        self.clock.start()
        window, wait_s = self.windows.take(self.step_number)
        self.clock.data_ready(wait_s)
        self.module.train()
        number = self.step_number + 1
        update = self.updater.submit(
            self.step_number, window.batches, self.loss, denominator=None, describe=lambda _: f"of step {number}"
        )
        timing = self.clock.stop()
        self.step_number = number
        self.items_seen += update.count
        self.epoch_position, self.epoch_ended = window.epoch_position, window.ends_epoch
        facts = {
            "step": number,
            "epoch": window.epoch_position,
            "tokens": update.count,
            "samples": update.count,
            "tokens_seen": self.items_seen,
            "micro_batches": len(window.batches),
            "loss_scale": None if self.updater.scaler is None else self.updater.scaler.scale,
        }
        return Pending(lambda: step_metrics(update.read(), timing(), **facts), is_ready=update.is_ready)

    def evaluate(self) -> EvalMetrics | None:
        """The mean loss over the validation batches; None where there are none."""
        if not self.validation:
            return None
        self.clock.interrupt()
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
        self.clock.interrupt()
        facts = {"tokens_seen": self.items_seen, "total_steps": self.total_steps}
        return capture_state(self.step_number, self.weights(), self.updater, self.device, facts)

    def restore(self, state: TrainingState) -> None:
        """Go on from `state` as if there had been no stop."""
        self.close()
        self.clock.interrupt()
        restore_state(state, self.weights(), self.updater, self.device)
        self.step_number, self.items_seen = state.step, int(state.facts["tokens_seen"])

    def close(self) -> None:
        """Stop the background thread; a later step starts it again."""
        self.windows.close()


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
        batches: the batches of an epoch (every epoch as long as the first), or a function from the epoch to them. The
            function may draw from the global generators of Python, NumPy and torch: they are seeded for each epoch. A
            sequence that makes its batches when they are asked for is asked in a background thread, and must have a
            generator of its own.
        loss: loss(module, batch) -> (sum of the losses, number of items), the sum a float32 scalar.
        validation: batches that `loss` is averaged over without training, once an epoch (ten times in all where epochs
            are under 20 steps) unless `evaluation` says else.
    """
    of_epoch = batches if callable(batches) else lambda _: batches
    randomness.seed_everything(settings.seed)
    session = ModuleSession(module, of_epoch, loss, settings, validation)
    run = RunDir(run_dir)
    run.path.mkdir(parents=True, exist_ok=True)
    resume(session, run.checkpoints)
    return run_loop(
        session,
        run,
        evaluation=evaluation or EvaluationSection(),
        checkpoint=checkpoint or CheckpointSection(),
        log=log or LogSection(),
        hooks=hooks or Hooks(),
    )

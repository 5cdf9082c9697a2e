"""The loop: steps, validations, checkpoints, signals, a full disk. The same for language models and any module."""

from __future__ import annotations

import errno
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tunesmith.checkpoint.agreement import Agreement
from tunesmith.checkpoint.state import TrainingState, list_states, load_latest
from tunesmith.errors import TrainingError
from tunesmith.recipe.schema import CheckpointSection, EvaluationSection, LogSection
from tunesmith.rundir.io import MetricsWriter
from tunesmith.rundir.layout import RunDir
from tunesmith.train.collection import CollectedBetweenSteps
from tunesmith.train.metrics import EvalMetrics, StepMetrics
from tunesmith.train.pending import Pending
from tunesmith.train.stopping import StopSignals
from tunesmith.train.together import Together

NO_WAIT, BAD_WAIT = 0.001, 0.1
SLOW_DATA = "batches are made by one thread beside the device's; give the process more cores, or longer documents"
VALIDATIONS, LONG_EPOCH = 10, 20
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_log = logging.getLogger(__name__)


class Trainable(Protocol):
    """What the loop advances: a language model's session, or a plain module's."""

    step_number: int
    total_steps: int
    epoch_position: float
    epoch_ended: bool

    def submit(self) -> Pending[StepMetrics]: ...

    def evaluate(self) -> EvalMetrics | None: ...

    def state(self) -> TrainingState: ...

    def restore(self, state: TrainingState) -> None: ...

    def close(self) -> None: ...


def _nothing(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Hooks:
    """What is called as training goes: for progress lines, trackers, and Python callers."""

    on_step: Callable[[StepMetrics], None] = _nothing
    on_evaluation: Callable[[EvalMetrics], None] = _nothing
    on_checkpoint: Callable[[Path], None] = _nothing
    on_warning: Callable[[str], None] = _log.warning


@dataclass
class LoopResult:
    """How it went. Losses are None where nothing was measured in this process."""

    steps: int
    loss: float | None = None
    validation: EvalMetrics | None = None
    stopped_by: signal.Signals | None = None
    duration_s: float = 0.0
    data_wait_s: float = 0.0
    skipped_steps: int = 0
    failed_saves: list[int] = field(default_factory=list)

    @property
    def data_wait_ratio(self) -> float | None:
        """The share of the steps' time in which the device waited for data; None without a step."""
        return self.data_wait_s / self.duration_s if self.duration_s else None

    @property
    def bottleneck(self) -> str | None:
        """ "data" when more than a tenth of the time went into waiting for data, else "device"; None without a step."""
        ratio = self.data_wait_ratio
        if ratio is None:
            return None
        return "data" if ratio > BAD_WAIT else "device"

    @property
    def data_verdict(self) -> str | None:
        """Whether data was ready before the device asked for it, in one line; None without a step."""
        ratio = self.data_wait_ratio
        if ratio is None:
            return None
        if ratio < NO_WAIT:
            return f"data never made the device wait ({ratio:.2%} of the steps' time)"
        waited = f"the device waited {ratio:.1%} of the steps' time for data"
        return f"{waited}: {SLOW_DATA}" if ratio > BAD_WAIT else waited


def resume(trainable: Trainable, checkpoints: Path, agreement: Agreement | None = None) -> Path | None:
    """Put `trainable` into the newest whole state. Returns that checkpoint; None when there is none yet.

    agreement: of the processes that train together: all come to the same state.
    Raises: CheckpointError when there are checkpoints and none is whole.
    """
    there = bool(list_states(checkpoints))
    if not (there if agreement is None else any(agreement.gather(there))):
        return None
    path, state = load_latest(checkpoints, agreement=agreement)
    trainable.restore(state)
    return path


def run_loop(
    trainable: Trainable,
    run: RunDir,
    *,
    evaluation: EvaluationSection,
    checkpoint: CheckpointSection,
    log: LogSection,
    hooks: Hooks,
    others: Together | None = None,
    checkpoints: Path | None = None,
) -> LoopResult:
    """Train to the last step, or until SIGTERM or Ctrl-C; the state is saved at the end of both.

    On a GPU a step's numbers are read while the next step runs; validations, checkpoints and the end wait for them.
    metrics.jsonl gets a row per logged step and per validation; rows after the step that `trainable` is at are dropped
    first, so that a resumed run has none twice.

    others: the processes that train together, each with a run directory of its own; `checkpoints` are then of all.
    Raises: TrainingError when the disk is full at the end, naming the last good checkpoint; whatever a step raises.
    """
    loop = _Loop(trainable, run, evaluation, checkpoint, log, hooks)
    loop.others, loop.checkpoints = others or Together(), checkpoints or run.checkpoints
    try:
        with (
            StopSignals(hooks.on_warning) as signals,
            MetricsWriter(run.metrics, resume_step=trainable.step_number) as w,
            CollectedBetweenSteps() as collection,
        ):
            loop.run(w, signals, collection)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise TrainingError(_disk_full_message(run, loop.checkpoints, error)) from error
    finally:
        loop.others.close()
        trainable.close()
    return loop.result


class _Loop:
    def __init__(
        self,
        trainable: Trainable,
        run: RunDir,
        evaluation: EvaluationSection,
        checkpoint: CheckpointSection,
        log: LogSection,
        hooks: Hooks,
    ) -> None:
        self.trainable, self.run_dir, self.hooks = trainable, run, hooks
        self.evaluation, self.checkpoint, self.log = evaluation, checkpoint, log
        self.result = LoopResult(trainable.step_number)
        self.saved_step = trainable.step_number
        self.saved_at = time.monotonic()
        self._pending: Pending[StepMetrics] | None = None
        self.others = Together()
        self.checkpoints = run.checkpoints
        self._prepared = False

    def run(self, metrics: MetricsWriter, signals: StopSignals, collection: CollectedBetweenSteps) -> None:
        stopped = self.others.signal(signals.received)
        while self.trainable.step_number < self.trainable.total_steps and stopped is None:
            self._step(metrics, collection)
            self._learn_of_saves()
            stopped = self.others.signal(signals.received)
            if stopped is None and self._evaluation_due():
                self._evaluate(metrics)
                stopped = self.others.signal(signals.received)
            if stopped is None and self.others.any(self._checkpoint_due()):
                self._settle(metrics)
                self._or_warn(self._save)
        self._settle(metrics)
        self._learn_of_saves(self.others.finish)
        self.result.stopped_by = stopped
        if self.saved_step < self.trainable.step_number:
            self._save()
            self.others.finish()

    def _step(self, metrics: MetricsWriter, collection: CollectedBetweenSteps) -> None:
        """Queue a step, then take the numbers of the one before: the device is never without work meanwhile."""
        try:
            following = self.trainable.submit()
        except Exception:
            self._settle(metrics)  # the step before is whole, or the reason
            raise
        collection.step_queued()
        self._settle(metrics)
        self._pending = following
        if following.is_ready:
            self._settle(metrics)
        if not self._prepared and (self.checkpoint.every_steps or self.checkpoint.every_minutes):
            self._prepared = True
            self.others.prepare(self.trainable, self.checkpoints, self.checkpoint.keep)

    def _settle(self, metrics: MetricsWriter) -> None:
        """Wait for the step that is under way, if there is one, and write its row. Raises: what the step raises."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        step = pending.read()
        result = self.result
        result.steps, result.loss = step.step, step.loss
        result.duration_s += step.duration_s
        result.data_wait_s += step.data_wait_s
        result.skipped_steps += int(step.skipped)
        if step.step % self.log.every_steps == 0 or step.step == self.trainable.total_steps:
            metrics.write(step.row())
        self.hooks.on_step(step)

    def _evaluation_due(self) -> bool:
        number, every = self.trainable.step_number, self.evaluation.every_steps
        if number == self.trainable.total_steps:
            return True
        if every is not None:
            return number % every == 0
        return self.trainable.epoch_ended and self._is_worth_validating()

    def _is_worth_validating(self) -> bool:
        """Whether the epoch had many steps, or another tenth of the run is done: little data has epochs of a step.

        A function of step and epoch alone, so that a resumed run decides the same.
        """
        number, total, epoch = self.trainable.step_number, self.trainable.total_steps, self.trainable.epoch_position
        in_epoch = number / epoch if epoch else 0.0
        before = round(number - in_epoch)
        return in_epoch >= LONG_EPOCH or number * VALIDATIONS // total > before * VALIDATIONS // total

    def _evaluate(self, metrics: MetricsWriter) -> None:
        self._settle(metrics)
        with self.others.long("validation"):
            measured = self.trainable.evaluate()
        if measured is not None:
            self.result.validation = measured
            metrics.write(measured.row())
            self.hooks.on_evaluation(measured)

    def _checkpoint_due(self) -> bool:
        number, every, minutes = self.trainable.step_number, self.checkpoint.every_steps, self.checkpoint.every_minutes
        if number == self.trainable.total_steps:
            return False  # the end saves anyway
        if every is not None and number % every == 0:
            return True
        return minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes

    def _save(self) -> None:
        self.others.save(self.trainable, self.checkpoints, self.checkpoint.keep, self.hooks.on_checkpoint)
        self.saved_step, self.saved_at = self.trainable.step_number, time.monotonic()

    def _learn_of_saves(self, ask: Callable[[], None] | None = None) -> None:
        self._or_warn(ask or self.others.poll)

    def _or_warn(self, act: Callable[[], None]) -> None:
        """A disk that is full in the middle costs this checkpoint, not the run."""
        try:
            act()
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            self.saved_step, self.saved_at = -1, time.monotonic()
            self.result.failed_saves.append(self.trainable.step_number)
            step = self.trainable.step_number
            self.hooks.on_warning(
                f"checkpoint of step {step} not written: {error.strerror}. {_kept(self.checkpoints)}; training goes on"
            )


def _kept(checkpoints: Path) -> str:
    states = list_states(checkpoints)
    return f"The last good checkpoint is {states[-1]}" if states else "There is no checkpoint yet"


def _disk_full_message(run: RunDir, checkpoints: Path, error: OSError) -> str:
    """`checkpoints` are those of all processes, in the run directory of the first. Of `fit` no recipe lies there."""
    whole = RunDir(checkpoints.parent)
    command = f"go on with: tunesmith train --resume {whole.path}"
    return (
        f"the disk is full ({error.strerror}: {error.filename or run.path}). {_kept(checkpoints)}: free space, "
        f"then {command if whole.recipe.is_file() else f'start the same program again: it goes on in {whole.path}'}"
    )

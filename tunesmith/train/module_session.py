"""Any torch module as something the loop can train."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor, nn

from tunesmith.checkpoint.shards import Shard
from tunesmith.checkpoint.state import TrainingState
from tunesmith.checkpoint.stored import fill
from tunesmith.errors import CheckpointError, DataError
from tunesmith.parallel.apply import spread_out
from tunesmith.parallel.data import Sharded
from tunesmith.parallel.mesh import Mesh, Place, joined
from tunesmith.parallel.progress import Progress
from tunesmith.parallel.watchdog import watched
from tunesmith.parallel.whole_again import WholeAgain
from tunesmith.recipe.parallel import ParallelSection
from tunesmith.recipe.schema import CheckpointSection, EvaluationSection, LogSection, TrainSection
from tunesmith.rundir.layout import RunDir
from tunesmith.train import randomness
from tunesmith.train.allocator import cap_device_memory
from tunesmith.train.clock import StepClock
from tunesmith.train.directories import RANKS
from tunesmith.train.loop import Hooks, LoopResult, resume, run_loop
from tunesmith.train.metrics import EvalMetrics, StepMetrics, step_metrics
from tunesmith.train.module_processes import (
    begin_alike,
    check_buffers,
    check_module,
    data_parallel,
    require_shapes,
    rest_of,
    through_forward,
    with_aliases,
    without_fillers,
)
from tunesmith.train.pending import Pending
from tunesmith.train.shards import capture_shards, restore_shards
from tunesmith.train.states import capture_state, check_finite, restore_state
from tunesmith.train.together import together
from tunesmith.train.update import Batch, LossFunction, Updater
from tunesmith.train.windows import BatchWindows, Part, own_batches


class ModuleSession(Generic[Batch]):
    """A module, its batches and its loss; see `fit`. mesh: the processes that share the batches; None: this one."""

    def __init__(
        self,
        module: nn.Module,
        batches: Callable[[int], Sequence[Batch]],
        loss: LossFunction[Batch],
        settings: TrainSection,
        validation: Sequence[Batch],
        mesh: Mesh | None = None,
        parallel: ParallelSection | None = None,
    ) -> None:
        self.module, self.settings, self.validation = module, settings, validation
        self.device = next(module.parameters()).device
        self.mesh = mesh or Mesh(Place(), self.device)
        parallel = data_parallel(parallel or ParallelSection())
        self.spread = spread_out(module, self.mesh, parallel)
        self.loss = without_fillers(through_forward(loss) if isinstance(self.spread, Sharded) else loss)
        count = self.mesh.size("dp")
        self.part = Part(self.mesh.index("dp"), count, parallel.micro_batches or settings.accumulation * count)
        self.windows = BatchWindows(batches, settings, self.device, self.part)
        self.total_steps = self.windows.total_steps
        self.updater = Updater(module, settings, self.total_steps, self.spread)
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
        total, count = self._validation_loss()
        if count == 0:
            raise DataError("no item of the validation batches is counted in the loss")
        mean = total / count
        return EvalMetrics(
            self.step_number, mean, math.exp(min(mean, 700.0)), count, count, time.perf_counter() - began
        )

    def _validation_loss(self) -> tuple[float, int]:
        """The sum over all processes, and of how many items it is."""
        total, count = 0.0, 0
        self.module.eval()
        with torch.no_grad():
            for batch in own_batches(self.validation, range(len(self.validation)), self.part):
                loss, items = self.loss(self.module, batch)
                total, count = total + float(loss), count + items
        if self.part.count == 1:
            return total, count
        shared = self.spread.total(torch.tensor(total, dtype=torch.float64, device=self.device))
        return float(shared), self.spread.count(count)

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by name."""
        return dict(self.module.state_dict(keep_vars=True))

    def state(self) -> TrainingState:
        """The complete state after the steps done so far."""
        self.clock.interrupt()
        return capture_state(self.step_number, self.weights(), self.updater, self.device, self._facts())

    def shards(self) -> tuple[list[Shard], dict[str, Any]]:
        """This process's part of the state, and its facts: what one of several processes saves."""
        self.clock.interrupt()
        check_buffers(self.module, self.mesh)
        check_finite(self.step_number, {piece.name: piece.local for piece in self.updater.pieces})
        shards, own = capture_shards(self.updater, self.mesh)
        shards += rest_of(self.module, self.updater.pieces, self.mesh)
        return with_aliases(shards, self.module), {**self._facts(), **own}

    def _facts(self) -> dict[str, Any]:
        facts = {"tokens_seen": self.items_seen, "total_steps": self.total_steps}
        return {**facts, "micro_batches": self.windows.width}

    def restore(self, state: TrainingState) -> None:
        """Go on from `state` as if there had been no stop. Raises: CheckpointError where it is of another run."""
        width = self.windows.width
        if state.facts.get("micro_batches", width) != width:
            raise CheckpointError(
                f"the run was started with {state.facts['micro_batches']} batches a step, of all processes, and would "
                f"go on with {width}: set parallel.micro_batches to what it was, or take another run_dir"
            )
        self.close()
        self.clock.interrupt()
        if self.mesh.world_size == 1:
            restore_state(state, self.weights(), self.updater, self.device)
        else:
            restore_shards(state, self.updater, self.mesh, self.settings.seed)
            fill(state.stored, rest_of(self.module, self.updater.pieces, self.mesh))
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
    parallel: ParallelSection | None = None,
) -> LoopResult:
    """Train any module with the loop that trains language models: same metrics, checkpoints, resumption and signals.

    The gradient of a step is that of (sum of losses) / (number of items) over its `settings.accumulation` batches.
    A `run_dir` that holds a checkpoint is gone on with, bit for bit on a CPU.

    Where torchrun, `tunesmith launch`, mpirun or srun started several processes, all of them call this alike, and share
    the batches of each step: by DDP unless `parallel` says else. They begin with the first one's weights; a GPU's
    process has its module moved to its own GPU. Afterwards each has all weights. The loss, called in every process, is
    to put a batch where `next(module.parameters()).device` is; the further processes' metrics are in `ranks/`.

    Args:
        batches: the batches of an epoch (every epoch as long as the first), or a function from the epoch to them. The
            function may draw from the global generators of Python, NumPy and torch: they are seeded for each epoch. A
            sequence that makes its batches when they are asked for is asked in a background thread, and must have a
            generator of its own; of several processes each asks for its own batches only.
        loss: loss(module, batch) -> (sum of the losses, number of items), the sum a float32 scalar.
        validation: batches that `loss` is averaged over without training, once an epoch (ten times in all where epochs
            are under 20 steps) unless `evaluation` says else.
        hooks: called in every process.
        parallel: strategy ddp, zero1, zero2 or zero3; `micro_batches` are the batches of a step, of all processes
            together (none: `settings.accumulation` times the processes), so that any number makes the same steps.

    Raises: ParallelError for what several processes can't do; RecipeError for a module without parameters, or a lazy
    one that was never called.
    """
    require_shapes(module)
    of_epoch = batches if callable(batches) else lambda _: batches
    wanted = data_parallel(parallel or ParallelSection())
    run = RunDir(run_dir)
    with joined(wanted, next(module.parameters()).device.type) as mesh:
        check_module(module, settings, mesh)
        if mesh.world_size > 1:
            module.to(mesh.device)
        cap_device_memory(next(module.parameters()).device, settings.device_memory_gb)
        asked = {"settings": settings.model_dump(mode="json"), "parallel": wanted.model_dump(mode="json")}
        begin_alike(module, mesh, {**asked, "run_dir": str(run_dir)})
        with watched(mesh, wanted, run_dir / "logs") as progress:
            whole = None if mesh.world_size == 1 or wanted.strategy == "ddp" else WholeAgain(module)
            randomness.seed_everything(settings.seed + mesh.index("dp"))
            session = ModuleSession(module, _patient(of_epoch, progress), loss, settings, validation, mesh, wanted)
            others = together(mesh, progress)
            if mesh.world_size > 1:
                session.updater.before_update = others.fence
            own = run if mesh.is_first else RunDir(run.path / RANKS / f"rank-{mesh.rank}")
            own.path.mkdir(parents=True, exist_ok=True)
            resume(session, run.checkpoints, others.agreement)
            result = run_loop(
                session,
                own,
                evaluation=evaluation or EvaluationSection(),
                checkpoint=checkpoint or CheckpointSection(),
                log=log or LogSection(),
                hooks=_with_progress(hooks or Hooks(), progress),
                others=others,
                checkpoints=run.checkpoints,
            )
            if whole is not None:
                whole.restore()
            return result


def _patient(batches: Callable[[int], Sequence[Batch]], progress: Progress) -> Callable[[int], Sequence[Batch]]:
    """`batches`, which may take long in one process alone."""

    def of_epoch(epoch: int) -> Sequence[Batch]:
        with progress.long("the batches of an epoch"):
            return batches(epoch)

    return of_epoch


def _with_progress(hooks: Hooks, progress: Progress) -> Hooks:
    def stepped(metrics: StepMetrics) -> None:
        progress.step_done(metrics.step)
        hooks.on_step(metrics)

    return replace(hooks, on_step=stepped)

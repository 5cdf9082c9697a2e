"""One optimiser step of any module under DeepSpeed: what `update.Updater` is for the native engine, with its face."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from tunesmith.checkpoint.shards import Shard
from tunesmith.checkpoint.state import TrainingState
from tunesmith.checkpoint.stored import fill
from tunesmith.errors import NonFiniteError
from tunesmith.model.block import Block
from tunesmith.model.decoder import Decoder
from tunesmith.model.lora import AdaptedLinear
from tunesmith.parallel.deepspeed_config import ZeroConfig, make_config
from tunesmith.parallel.deepspeed_conflicts import RunFacts
from tunesmith.parallel.deepspeed_engine import ZeroEngine, ZeroStep
from tunesmith.parallel.deepspeed_state import Fragment
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.spread import Piece
from tunesmith.recipe.parallel import ParallelSection
from tunesmith.recipe.schema import Recipe, TrainSection
from tunesmith.train.optimizers import parameter_groups
from tunesmith.train.schedules import learning_rate, peak_learning_rate, warmup_steps
from tunesmith.train.update import Batch, LossFunction, PendingUpdate, Update

_log = logging.getLogger(__name__)
_LARGE = 1 << 18  # values: DeepSpeed leaves shares of less than 1 MiB in the host's memory


class _Scale:
    """DeepSpeed's loss scale, as it is now."""

    def __init__(self, engine: ZeroEngine) -> None:
        self._engine = engine

    @property
    def scale(self) -> float:
        """What losses are multiplied by."""
        return self._engine.loss_scale or 1.0

    def state(self) -> dict[str, float]:
        """What is saved of it."""
        return {"scale": self.scale}


class DeepSpeedUpdater:
    """DeepSpeed's engine, our schedule, our errors.

    `engine` is also what a session evaluates through (`engine.loss`), and sums over processes with. DeepSpeed reads the
    gradients' norm on the host in every step, so a step is over when `submit` returns.
    """

    def __init__(self, module: nn.Module, settings: TrainSection, total_steps: int, config: ZeroConfig, mesh: Mesh):
        self.module, self.settings, self.total_steps = module, settings, total_steps
        groups = parameter_groups(module.named_parameters(), settings.weight_decay)
        self.engine = ZeroEngine(module, config, groups, _options(settings), mesh)
        self.scaler = _Scale(self.engine) if self.engine.loss_scale is not None else None
        self.pieces: list[Piece] = []  # DeepSpeed's optimiser sees no parameter, but flat shares: see `shards`
        self.before_update: Callable[[], None] | None = None
        self._steps = 0

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser that DeepSpeed drives."""
        return self.engine.optimizer

    def step(
        self,
        number: int,
        window: Sequence[Batch],
        loss: LossFunction[Batch],
        *,
        denominator: int | None,
        describe: Callable[[Batch], str],
    ) -> Update:
        """`submit`, read."""
        return self.submit(number, window, loss, denominator=denominator, describe=describe).read()

    def submit(
        self,
        number: int,
        window: Sequence[Batch],
        loss: LossFunction[Batch],
        *,
        denominator: int | None,
        describe: Callable[[Batch], str],
    ) -> PendingUpdate:
        """Update number `number` (from 0) on the batches of `window`; every process has as many.

        Args: denominator: items counted in the windows of all processes; None: found on the way. describe: names a
        batch. Raises: NonFiniteError when no item is counted. Reading raises: NonFiniteError, on every process, when a
        loss or a gradient of any of them is NaN or Inf; nothing was updated then.
        """
        if denominator == 0:
            raise NonFiniteError(f"step {number + 1}: no item of the batch is counted in the loss")
        rate = learning_rate(self.settings, number, self.total_steps)
        done = self.engine.step(window, loss, rate, denominator, self.before_update)
        self._steps = number + 1
        if done.count == 0:
            raise NonFiniteError(f"step {number + 1}: no item of the batch is counted in the loss")
        names = [describe(batch) for batch in window]
        return PendingUpdate(lambda: self._read(number, done, rate, names), done.count, is_ready=True)

    def forget_failure(self) -> None:
        """Nothing to do: a step that is not finite leaves nothing behind."""

    def shards(self) -> list[Shard]:
        """This process's part of the weights and the optimiser's states, by the native engine's names.

        All processes must call it. Raises: NonFiniteError, in all, when a weight is NaN or Inf; CheckpointError.
        """
        fragments = self.engine.state().fragments()
        weights = [fragment for fragment in fragments if fragment.name.startswith("model.")]
        bad = [fragment.name for fragment in weights if not bool(torch.isfinite(fragment.tensor).all())]
        if self.engine.count(len(bad)):
            what = bad[0] if bad else "a weight of another process"
            raise NonFiniteError(
                f"the update of step {self._steps} made {what} NaN or infinite, so nothing of it is saved; checkpoints "
                f"before it are as they were"
            )
        return [_shard(fragment) for fragment in fragments]

    def restore(self, state: TrainingState) -> None:
        """Put weights and the optimiser's states back, whichever engine and however many processes wrote them.

        All processes must call it. Raises: CheckpointError when they are not those of this model.
        """
        held = self.engine.state()
        fragments = held.fragments()
        names = {fragment.name for fragment in fragments}
        kept_as_facts = state.facts.get("optimizer") or {}
        for fragment in fragments:
            if fragment.name not in state.tensors and fragment.name.endswith(".step"):
                name = fragment.name.removeprefix("optimizer.").removesuffix(".step")
                fragment.tensor.fill_(float(kept_as_facts.get(name, {}).get("step", state.step)))
                names.discard(fragment.name)
        fill(state.stored, [_shard(fragment) for fragment in fragments if fragment.name in names])
        self.engine.restored(held, fragments)
        if self.scaler is not None and state.facts.get("scaler"):
            self.engine.set_loss_scale(float(state.facts["scaler"]["scale"]))

    def close(self) -> None:
        """Let DeepSpeed go."""
        self.engine.close()

    def _read(self, number: int, done: ZeroStep, rate: float, names: list[str]) -> Update:
        for name, value in zip(names, done.losses, strict=True):
            if not math.isfinite(value):
                raise _failed(number, f"the loss is {value}", name)
        if not math.isfinite(done.loss_sum):
            raise _failed(number, f"the loss of another process is {done.loss_sum}", "in that process's message")
        if not done.is_finite and self.scaler is None:
            raise _failed(number, "the gradient norm is NaN or infinite", "; ".join(names))
        return Update(done.loss_sum / done.count, done.count, done.grad_norm, rate, not done.is_finite)


def deepspeed_updater(
    recipe: Recipe, module: nn.Module, total_steps: int, mesh: Mesh, micro_batches: int
) -> DeepSpeedUpdater:
    """The updater of a resolved recipe's language model, which is DeepSpeed's from here on.

    micro_batches: of a step, of each process. Raises: RecipeError, ParallelError, MissingExtraError.
    """
    tokens = recipe.train.micro_batch_tokens or recipe.data.max_length
    config = deepspeed_config(
        recipe.parallel,
        recipe.train,
        module,
        total_steps,
        mesh,
        micro_batches=micro_batches,
        sequences=max(tokens // recipe.data.max_length, 1),
        hidden_size=module.config.hidden_size if isinstance(module, Decoder) else None,
    )
    for note in config.notes:
        _log.info("%s: %s", config.source, note)
    return DeepSpeedUpdater(module, recipe.train, total_steps, config, mesh)


def deepspeed_config(
    parallel: ParallelSection,
    train: TrainSection,
    module: nn.Module,
    total_steps: int,
    mesh: Mesh,
    *,
    micro_batches: int,
    sequences: int | None = None,
    hidden_size: int | None = None,
) -> ZeroConfig:
    """DeepSpeed's configuration for a resolved recipe.

    Args: micro_batches: of a step, of each process. sequences: of data.max_length that a micro-batch holds;
    hidden_size: the model's width (both None for a module that is no language model). Raises: RecipeError.
    """
    facts = RunFacts(
        world_size=mesh.world_size,
        micro_batches=micro_batches,
        learning_rate=peak_learning_rate(train),
        total_steps=total_steps,
        warmup_steps=warmup_steps(train, total_steps),
        sequences=sequences,
        hidden_size=hidden_size,
        has_adapters=any(isinstance(child, AdaptedLinear) for child in module.modules()),
        is_cuda=mesh.device.type == "cuda",
        largest_weight=max((tensor.numel() for tensor in _tensors(module)), default=0),
        weights_at_once=_weights_at_once(module),
    )
    return make_config(parallel, train, facts)


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _weights_at_once(module: nn.Module) -> int:
    """Large weights of two blocks, and of what stands before and behind the blocks."""
    blocks = [child for child in module.modules() if isinstance(child, Block)]
    most = max((sum(t.numel() >= _LARGE for t in _tensors(block)) for block in blocks), default=4)
    return 2 * most + 2


def _shard(fragment: Fragment) -> Shard:
    return Shard(fragment.name, fragment.tensor, fragment.shape, fragment.slices)


def _options(settings: TrainSection) -> dict[str, Any]:
    rate = {"lr": peak_learning_rate(settings)}
    if settings.optimizer == "sgd":
        return rate
    return {**rate, "betas": (settings.beta1, settings.beta2), "eps": settings.eps}


def _failed(number: int, what: str, batch: str) -> NonFiniteError:
    return NonFiniteError(
        f"step {number + 1}: {what}; nothing was updated. Batch: {batch}. Lower train.learning_rate, look at these "
        f"rows, or set train.detect_anomaly: true"
    )

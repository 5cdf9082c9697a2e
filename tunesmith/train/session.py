"""A training session: the model, its data and its optimiser, advanced one step at a time."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.checkpoint.shards import Shard
from tunesmith.checkpoint.source import resolve_model
from tunesmith.checkpoint.state import TrainingState
from tunesmith.errors import CheckpointError, DataError, NonFiniteError
from tunesmith.model import attention_choice
from tunesmith.model.decoder import Decoder
from tunesmith.model.language_model import LanguageModel
from tunesmith.model.methods import MethodSummary
from tunesmith.parallel.mesh import Mesh, Place
from tunesmith.parallel.tensor import own_targets
from tunesmith.recipe.schema import Recipe
from tunesmith.text.packing import plan_epoch
from tunesmith.text.tokenizer import Tokenizer
from tunesmith.train import randomness
from tunesmith.train.allocator import cap_device_memory, prepare_allocator
from tunesmith.train.batches import Dataset, MicroBatch, build_micro_batch, describe_rows
from tunesmith.train.clock import StepClock, StepTime
from tunesmith.train.cpu_operations import prepare_cpu_operations
from tunesmith.train.deepspeed_update import DeepSpeedUpdater
from tunesmith.train.determinism import set_determinism
from tunesmith.train.engines import loss_without_step, spread_and_updater
from tunesmith.train.losses import cross_entropy_sum, head_of
from tunesmith.train.metrics import EvalMetrics, StepMetrics, step_metrics
from tunesmith.train.order import DataOrder, Window
from tunesmith.train.pending import Pending
from tunesmith.train.prefetch import Prefetcher
from tunesmith.train.resolve import resolve_recipe
from tunesmith.train.session_data import DEFAULT_RANDOM_ROWS as DEFAULT_RANDOM_ROWS
from tunesmith.train.session_data import SessionData as SessionData
from tunesmith.train.session_data import check_positions, data_from_files, model_vocab_size, random_data
from tunesmith.train.shards import capture_shards, restore_shards
from tunesmith.train.share import count_tokens, count_trained, own_packs, packs_of_a_step
from tunesmith.train.speed import SpeedMeter
from tunesmith.train.start import Beside, warm_device
from tunesmith.train.states import capture_state, check_finite, restore_state
from tunesmith.train.trainable import Progress, load_trainable
from tunesmith.train.update import Update
from tunesmith.watch.start_up import StartUp


@dataclass(frozen=True)
class HostWindow:
    """One step's micro-batches of this process, on the host.

    num_trained: the denominator of the loss, trained tokens of the whole window, of all processes; num_tokens: its
    tokens, fillers left out.
    """

    window: Window
    batches: tuple[MicroBatch, ...]
    num_trained: int
    num_tokens: int


class Session:
    """Made by `build_session`. `step()` and `evaluate()` are all that training is."""

    def __init__(
        self,
        recipe: Recipe,
        model: LanguageModel,
        data: SessionData,
        method_summary: MethodSummary,
        model_directory: Path,
        mesh: Mesh | None = None,
    ) -> None:
        assert recipe.train.micro_batch_tokens is not None
        self.recipe = recipe
        self.model = model
        self.module = cast(nn.Module, model)
        self.data = data
        self.tokenizer: Tokenizer | None = None if data.loaded is None else data.loaded.tokenizer
        self.method_summary = method_summary
        self.model_directory = model_directory
        self.device = torch.device(recipe.model.device)
        self.mesh = mesh or Mesh(Place(), self.device)
        self.micro_batch_tokens = recipe.train.micro_batch_tokens
        width = packs_of_a_step(recipe, self.mesh.size("dp"))
        self.order = DataOrder(data.train.lengths, recipe.data, recipe.train, self.micro_batch_tokens, width)
        self.total_steps = self.order.total_steps
        if recipe.train.epochs is None:
            self.recipe = recipe.model_copy(
                update={"train": recipe.train.model_copy(update={"epochs": self.order.epochs})}
            )
        self.speed = SpeedMeter(model, recipe, self.device)
        self.spread, self.updater = spread_and_updater(recipe, self.module, self.total_steps, self.mesh, width)
        self.step_number = 0
        self.tokens_seen = 0
        self.epoch_position = 0.0
        self.epoch_ended = False
        self.clock = StepClock(self.device)
        self._prefetcher: Prefetcher[HostWindow] | None = None

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser in use."""
        return self.updater.optimizer

    def step(self) -> StepMetrics:
        """One optimiser step on the next window of data, waited for.

        Raises: NonFiniteError, with nothing updated, when the loss or a gradient is NaN or Inf; DataError.
        """
        self.clock.interrupt()
        try:
            return self.submit().read()
        except NonFiniteError:
            self.updater.forget_failure()
            raise

    def submit(self) -> Pending[StepMetrics]:
        """Queue one optimiser step on the next window of data. On a GPU the host does not wait for it.

        Raises: DataError; and when the result is read, NonFiniteError (see `Updater.submit`).
        """
        self.clock.start()
        host, wait_s = self._next_window()
        self.clock.data_ready(wait_s)
        if not self.model.training:
            self.model.train()
        batches = [batch.to(self.device) for batch in host.batches]
        with torch.autograd.set_detect_anomaly(self.recipe.train.detect_anomaly):
            self._promise_same_weights(False)
            update = self.updater.submit(
                self.step_number,
                batches,
                self._micro_batch_loss,
                denominator=host.num_trained,
                describe=lambda batch: describe_rows(self.data.train, batch.documents),
            )
            self._promise_same_weights(False)
        timing = self.clock.stop()
        self.step_number += 1
        tokens = host.num_tokens
        self.tokens_seen += tokens
        self.epoch_position, self.epoch_ended = host.window.epoch_position, host.window.ends_epoch
        facts = {
            "step": self.step_number,
            "epoch": self.epoch_position,
            "tokens": tokens,
            "samples": sum(len(pack) for pack in host.window.packs),
            "tokens_seen": self.tokens_seen,
            "micro_batches": len(host.window.packs),
            "loss_scale": None if self.updater.scaler is None else self.updater.scaler.scale,
        }
        machine = self.speed.look(batches)
        return Pending(lambda: self._metrics(update.read(), timing(), facts, machine), is_ready=update.is_ready)

    def _micro_batch_loss(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, int]:
        loss = language_model_loss(model, batch, self.recipe.train.loss_chunk_tokens)
        self._promise_same_weights(True)
        return loss

    def _promise_same_weights(self, promised: bool) -> None:
        """Whether the next forward pass finds the parameters that the last one found: within a step it does."""
        if isinstance(self.model, Decoder):
            self.model.has_same_weights = promised

    def _metrics(self, update: Update, time: StepTime, facts: dict[str, Any], machine: dict[str, Any]) -> StepMetrics:
        return step_metrics(update, time, **facts, **self.speed.with_rates(machine, time.duration_s))

    def evaluate(self) -> EvalMetrics | None:
        """Loss and perplexity on the validation data; None where there is none."""
        if self.data.validation is None:
            return None
        self.clock.interrupt()
        began = time.perf_counter()
        try:
            total, trained, tokens = self._validation_loss(self.data.validation)
        except torch.OutOfMemoryError:
            if not self._frees_graphs():
                raise
            total, trained, tokens = self._validation_loss(self.data.validation)
        if trained == 0:
            raise DataError("no token of the validation data is in the loss: see data.validation and data.train_on")
        loss_value = total.item() / trained
        perplexity = math.exp(min(loss_value, 700.0))
        return EvalMetrics(self.step_number, loss_value, perplexity, tokens, trained, time.perf_counter() - began)

    def _validation_loss(self, validation: Dataset) -> tuple[Tensor, int, int]:
        """The sum of the losses (float64, on the device), over how many tokens it is, and how many were read."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        tokens = trained = 0
        function = partial(language_model_loss, chunk_tokens=self.recipe.train.loss_chunk_tokens)
        with self._evaluating():
            for batch in self._validation_batches(validation):
                loss, count = loss_without_step(self.spread, self.module, function, batch)
                total, trained, tokens = total + loss, trained + count, tokens + batch.num_tokens
        return self.spread.total(total), self.spread.count(trained), self.spread.count(tokens)

    def _frees_graphs(self) -> bool:
        """Give the memory that CUDA graphs hold between the steps back; False where there are none."""
        captured = self.model.captured if isinstance(self.model, Decoder) else None
        if captured is None or captured.num_graphs == 0:
            return False
        captured.give_up("validation needs the memory that recordings hold between the steps")
        return True

    def trained_weights(self) -> dict[str, Tensor]:
        """What is trained, by logical name."""
        return trained_weights(self.model)

    def state(self) -> TrainingState:
        """The complete state after the steps done so far."""
        self.clock.interrupt()
        if isinstance(self.updater, DeepSpeedUpdater):
            shards, facts = self.shards()
            return TrainingState(self.step_number, {shard.name: shard.tensor for shard in shards}, facts)
        return capture_state(self.step_number, self.trained_weights(), self.updater, self.device, self._facts())

    def restore(self, state: TrainingState) -> None:
        """Go on from `state` as if there had been no stop.

        Raises: CheckpointError when it is of another model, method or data.
        """
        if state.facts["data"]["fingerprint"] != self.data_fingerprint():
            raise CheckpointError("the training data is not what the checkpoint was trained on: start a new run")
        self.close()
        self.clock.interrupt()
        if self.mesh.world_size > 1 or isinstance(self.updater, DeepSpeedUpdater):
            restore_shards(state, self.updater, self.mesh, self.recipe.train.seed)
        else:
            restore_state(state, self.trained_weights(), self.updater, self.device)
        self.step_number, self.tokens_seen = state.step, int(state.facts["tokens_seen"])

    def shards(self) -> tuple[list[Shard], dict[str, Any]]:
        """This process's part of the state, and its facts: what one of several processes saves."""
        self.clock.interrupt()
        check_finite(self.step_number, {piece.name: piece.local for piece in self.updater.pieces})
        shards, own = capture_shards(self.updater, self.mesh)
        return shards, {**self._facts(), **own}

    def _facts(self) -> dict[str, Any]:
        return {
            "tokens_seen": self.tokens_seen,
            "total_steps": self.total_steps,
            "data": {"next_step": self.step_number, "fingerprint": self.data_fingerprint()},
        }

    def close(self) -> None:
        """Stop the background thread; a later step starts it again."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def host_window(self, step: int) -> HostWindow:
        """The data of step number `step` (from 0), on the host."""
        window, data, train = self.order.window(step), self.recipe.data, self.data.train
        batches = tuple(self._build(train, pack) for pack in self._own(window.packs))
        if self.mesh.size("dp") > 1:
            counts = count_trained(train, window.packs, data), count_tokens(train, window.packs, data)
        else:
            counts = sum(batch.num_trained for batch in batches), sum(batch.num_tokens for batch in batches)
        return HostWindow(window, batches, *counts)

    def _own(self, packs: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """This process's of the packs of a step, or of a validation."""
        return own_packs(packs, self.mesh.index("dp"), self.mesh.size("dp"))

    def _next_window(self) -> tuple[HostWindow, float]:
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self.host_window, self.step_number, self.total_steps)
        return self._prefetcher.take()

    def _build(self, dataset: Dataset, documents: tuple[int, ...]) -> MicroBatch:
        vocab_size = model_vocab_size(self.model)
        batch = build_micro_batch(dataset, documents, self.micro_batch_tokens, self.recipe.data, vocab_size)
        on_host = self.device.type != "cuda"
        batch = batch.without_tail() if on_host and not self._sends_parts else batch
        batch = batch.part(partial(own_targets, mesh=self.mesh)) if self.mesh.size("tp") > 1 else batch
        if on_host:
            return batch
        with torch.cuda.device(self.device):  # a thread begins on the first GPU, and pinning would take memory there
            return batch.pinned()

    @property
    def _sends_parts(self) -> bool:
        """Whether a pipeline's stages send their own tokens only: which those are goes by the length of the packs, so
        all must have one from the beginning, not when the pipeline makes shorter ones as long as the longest."""
        return self.mesh.size("pp") > 1 and self.mesh.size("tp") > 1

    def _validation_batches(self, dataset: Dataset) -> Iterator[MicroBatch]:
        data = self.recipe.data
        plan = plan_epoch(
            dataset.lengths,
            self.micro_batch_tokens,
            seed=0,
            epoch=0,
            packing=data.packing,
            max_length=data.max_length,
            shuffle=False,
        )
        for documents in self._own(plan[: self.recipe.evaluation.max_batches]):
            yield self._build(dataset, documents).to(self.device)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)

    def data_fingerprint(self) -> str:
        """What the training documents are, in their order."""
        train = self.data.train
        return hashlib.sha256(train.lengths.tobytes() + train.hashes.tobytes()).hexdigest()


def language_model_loss(model: nn.Module, batch: MicroBatch, chunk_tokens: int) -> tuple[Tensor, int]:
    """The sum of the losses of a micro-batch, and how many tokens it is over."""
    language_model = cast(LanguageModel, model)
    hidden = language_model.hidden(batch.pack)
    loss = cross_entropy_sum(hidden, batch.index, batch.targets, head_of(language_model), chunk_tokens)
    return loss, batch.num_trained


def trained_weights(model: LanguageModel) -> dict[str, Tensor]:
    """What of `model` is trained, by logical name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def build_session(
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    start_up: StartUp | None = None,
    mesh: Mesh | None = None,
) -> Session:
    """The session of a recipe: its autos resolved into a new recipe, model and data loaded, method applied.

    Files of data are read and tokenised in a thread while the weights are loaded. `start_up` gets the seconds.
    mesh: the processes of the run, of which every one calls this; None: there is this one.
    Raises: RecipeError, ModelError, DataError, DeviceError.
    """
    watch = StartUp() if start_up is None else start_up
    with watch.part("recipe and device"):
        prepare_allocator(recipe.model.device)
        resolved = resolve_recipe(recipe, 1 if mesh is None else mesh.world_size)
        set_determinism(resolved)
        attention_choice.offer("flex", resolved.train.flex_attention)
        prepare_cpu_operations(resolved)
        cap_device_memory(torch.device(resolved.model.device), resolved.train.device_memory_gb)
        directory = resolve_model(resolved.model.path, resolved.model.revision)
    with (
        watch.part("threads beside"),
        Beside(partial(_read_data, resolved, progress, watch), "data") as files,
        Beside(partial(_warm, resolved, watch), "warm") as warmed,
    ):
        model, summary = load_trainable(resolved, progress, watch, mesh)
        with watch.part("data waited for"):
            data = files.take() or random_data(resolved, model)
        with watch.part("libraries waited for"):
            warmed.take()
    with watch.part("optimiser"):
        check_positions(model, resolved.data)
        randomness.seed_everything(resolved.train.seed + (0 if mesh is None else mesh.index("dp")))
        return Session(resolved, model, data, summary, directory, mesh)


def _warm(recipe: Recipe, watch: StartUp, is_wanted: Callable[[], None]) -> None:
    with watch.beside("libraries"):
        warm_device(recipe)


def _read_data(
    recipe: Recipe, progress: Progress | None, watch: StartUp, is_wanted: Callable[[], None]
) -> SessionData | None:
    """What the recipe's files hold; None for random tokens, which are the model's."""
    if recipe.data.format == "tokens":
        return None

    def look(what: str, done: int, total: int) -> None:
        is_wanted()
        if progress is not None:
            progress(what, done, total)

    with watch.beside("data"):
        return data_from_files(recipe, look)

"""The bare training loop that peers run in: kinder to them than a trainer, and the same operations as ours.

Batches wait in page-locked memory and are moved to the device inside the steps, without a wait, as ours are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.bench.cell import synchronise
from tunesmith.bench.peers.batches import Documents, digest, load_windows, peer_inputs
from tunesmith.bench.peers.job import Job
from tunesmith.bench.peers.timing import CONTINUOUS, Mark, QueuedSteps, mark_of, timing_of
from tunesmith.bench.peers.wire import NotApplicableError, Say, require
from tunesmith.recipe.schema import TrainSection
from tunesmith.train.optimizers import make_optimizer, parameter_groups
from tunesmith.train.randomness import seed_everything
from tunesmith.watch.memory import MemoryReading, MemorySampler

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class HostStep:
    """One step on the host: the inputs of its micro-batches and the share of the trained tokens that each has."""

    inputs: tuple[Inputs, ...]
    shares: tuple[float, ...]
    num_tokens: int
    num_trained: int


def host_steps(job: Job) -> tuple[list[HostStep], str]:
    """Every step's inputs, in page-locked memory where there is a GPU, and the digest of the first step."""
    windows = load_windows(job.batches)
    return [_host_step(window, job) for window in windows], digest(windows[0])


def _host_step(window: Sequence[Documents], job: Job) -> HostStep:
    trained = sum(documents.num_trained for documents in window)
    inputs = tuple(_pinned(peer_inputs(d, packed=job.recipe.data.packing), job.device) for d in window)
    shares = tuple(documents.num_trained / trained for documents in window)
    return HostStep(inputs, shares, sum(d.num_tokens for d in window), trained)


def _pinned(inputs: Inputs, device: torch.device) -> Inputs:
    return {name: t.pin_memory() if device.type == "cuda" else t for name, t in inputs.items()}


def optimizer_for(model: nn.Module, settings: TrainSection) -> torch.optim.Optimizer:
    """The recipe's optimiser as peers have it: torch's fused AdamW or SGD, bitsandbytes' AdamW with 8-bit states."""
    if settings.optimizer in ("adamw", "sgd"):
        return make_optimizer(model.named_parameters(), settings)
    if settings.optimizer != "adamw8bit":
        raise NotApplicableError(f"peers have no optimizer {settings.optimizer!r}")
    require("bitsandbytes", "bitsandbytes")
    from bitsandbytes.optim import AdamW8bit

    groups = parameter_groups(model.named_parameters(), settings.weight_decay)
    return AdamW8bit(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps, weight_decay=0.0)


def train(model: Any, job: Job, say: Say, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Train `model` (of transformers' face) for the job's steps, saying each; returns what else was measured."""
    steps, first_digest = host_steps(job)
    optimizer = optimizer_for(model, job.recipe.train)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    seed_everything(job.recipe.train.seed)
    model.train()
    recorder = Recorder(job, say)
    with torch.autocast(job.device.type, job.compute_dtype, enabled=job.needs_autocast):
        for number, step in enumerate(steps):
            recorder.record(_step_function(model, optimizer, trained, step, job, job.rates[number]))
    return {
        **recorder.finish(),
        "digest": first_digest,
        "tokens": [step.num_tokens for step in steps],
        "trained_tokens": [step.num_trained for step in steps],
        **dtypes_of(model, optimizer),
        **facts,
        "autocast": job.needs_autocast,
    }


def _step_function(
    model: Any, optimizer: torch.optim.Optimizer, trained: list[nn.Parameter], step: HostStep, job: Job, rate: float
) -> Callable[[], tuple[Tensor, Tensor]]:
    limit = job.recipe.train.max_grad_norm or math.inf

    def run() -> tuple[Tensor, Tensor]:
        losses = []
        for inputs, share in zip(step.inputs, step.shares, strict=True):
            moved = {name: tensor.to(job.device, non_blocking=True) for name, tensor in inputs.items()}
            loss = model(**moved, use_cache=False).loss
            loss = loss if share == 1.0 else loss * share
            loss.backward()
            losses.append(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(trained, limit)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return sum(losses[1:], losses[0]), norm

    return run


class Recorder:
    """Times steps and reads the memory they took; the peaks start from what is held when it is made.

    The warm-up's steps are timed from an idle device to an idle device and said at once; the timed ones as `timing`
    says: continuous ones are said when all are done.
    """

    def __init__(
        self, job: Job, say: Say, *, timing: str | None = None, mark: Callable[[], Mark] | None = None
    ) -> None:
        self.device = job.device
        self.say = say
        self.warmup = job.recipe.bench.warmup_steps
        self.timing = timing or timing_of(self.device)
        self._mark = mark or mark_of(self.device)
        self._count = 0
        self._began = 0.0
        self._queued: QueuedSteps | None = None
        self._before: MemoryReading | None = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._sampler = MemorySampler(self.device)
        self._sampler.start()

    def record(self, step: Callable[[], tuple[Any, Any]]) -> None:
        """Run one step, and take its time, its loss and its gradient norm."""
        self.begin()
        self.end(*step())

    def begin(self) -> None:
        """A step begins: the peaks of the timed steps are kept apart from the warm-up's."""
        if self._count == self.warmup:
            self._before = self._sampler.read()
            self._sampler.start()
        if self._queued is not None:
            return
        synchronise(self.device)
        if self.timing == CONTINUOUS and self._count == self.warmup:
            self._queued = QueuedSteps(self._mark)
        self._began = time.perf_counter()

    def end(self, loss: Tensor | float, grad_norm: Tensor | float) -> None:
        """A step ends, or all of it is queued."""
        if self._queued is not None:
            self._count += 1
            self._queued.end(loss, grad_norm)
            return
        synchronise(self.device)
        self.add(time.perf_counter() - self._began, float(loss), float(grad_norm))

    def add(self, seconds: float, loss: float, grad_norm: float) -> None:
        """Say a step that was timed elsewhere."""
        self._count += 1
        self._say_step(seconds, loss, grad_norm)

    def _say_step(self, seconds: float, loss: float, grad_norm: float) -> None:
        self.say({"event": "step", "seconds": seconds, "loss": loss, "grad_norm": grad_norm})

    def finish(self) -> dict[str, Any]:
        """Say the steps that were queued. Returns: how steps were timed, and the peaks in bytes.

        The peaks are of the timed steps and of all steps; None where there is no such figure.
        """
        synchronise(self.device)
        for step in () if self._queued is None else self._queued.read():
            self._say_step(*step)
        timed = self._sampler.read()
        self._sampler.stop()
        before = self._before or timed
        return {
            "timing": self.timing,
            "memory": {
                "allocated_peak_bytes": timed.device_allocated_peak_bytes,
                "reserved_peak_bytes": timed.device_reserved_peak_bytes,
                "resident_peak_bytes": timed.resident_peak_bytes,
                "all_steps_allocated_peak_bytes": _highest(before, timed, "device_allocated_peak_bytes"),
                "all_steps_reserved_peak_bytes": _highest(before, timed, "device_reserved_peak_bytes"),
            },
            "threads": torch.get_num_threads(),
        }


def _highest(first: MemoryReading, second: MemoryReading, name: str) -> int | None:
    values = [value for value in (getattr(first, name), getattr(second, name)) if value is not None]
    return max(values, default=None)


def dtypes_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Trained parameters and the dtypes in use, by what they are used for."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.ndim]
    return {
        "trainable_parameters": sum(parameter.numel() for parameter in trained),
        "dtypes": {"trained": _names(trained), "frozen": _names(frozen), "optimizer": _names(states)},
    }


def _names(tensors: Sequence[Tensor]) -> list[str]:
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})

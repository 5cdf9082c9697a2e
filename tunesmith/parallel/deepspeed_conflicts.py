"""A ds_config.json against the recipe: what must agree, and what tunesmith can't train with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import RecipeError
from tunesmith.parallel.deepspeed_json import JsonFile
from tunesmith.recipe.parallel import ParallelSection
from tunesmith.recipe.schema import TrainSection

Expected = Mapping[str, tuple[Any, str]]
"""DeepSpeed's dotted key -> the recipe's value, and the keys it comes from."""
_MISSING = object()
_SCHEDULES = {"warmuplr": "constant", "warmupdecaylr": "linear", "warmupcosinelr": "cosine"}
_OWN_ORDER = "the order of samples is tunesmith's: leave it out"
_OWN_CASTS = "the model casts by itself, as train.precision says: leave it out"
_FOREIGN: dict[str, tuple[Any, str]] = {
    "gradient_allreduce_op": ("sum", "tunesmith scales its losses for DeepSpeed's mean: leave it out"),
    "managed_gradient_accumulation": (False, "tunesmith says where a step ends: leave it out"),
    "zero_optimization.compute_grad_norm": (False, "the norm is logged, clips, and finds NaN: leave it out"),
    "bf16.check_grad_overflow": (False, "a NaN would reach the weights: leave it out"),
    "fp16.auto_cast": (True, _OWN_CASTS),
    "torch_autocast.enabled": (True, _OWN_CASTS),
    "amp.enabled": (True, _OWN_CASTS),
    "curriculum_learning.enabled": (True, _OWN_ORDER),
    "data_efficiency.enabled": (True, _OWN_ORDER),
    "hybrid_engine.enabled": (True, "it is for generating while training: leave it out"),
    "progressive_layer_drop.enabled": (True, "blocks are never left out: leave it out"),
    "zero_optimization.stage": (0, "that is plain data parallelism: set 1, 2 or 3, or parallel.engine native"),
}
_ONE_ONLY = {
    "tensor_parallel.autotp_size": "parallel.tensor with parallel.engine native",
    "sequence_parallel_size": "parallel.tensor with parallel.engine native",
    "pipeline.stages": "parallel.pipeline with parallel.engine native",
}


@dataclass(frozen=True)
class RunFacts:
    """What a recipe comes to, as far as DeepSpeed asks.

    micro_batches: of one step, of each process. sequences: of a micro-batch; None: not known, then a file's number is
    taken. hidden_size: None for a module that is no language model. largest_weight: values of the largest one.
    weights_at_once: large ones that a block and the one fetched ahead of it have; both for offload to NVMe.
    """

    world_size: int
    micro_batches: int
    learning_rate: float
    total_steps: int
    warmup_steps: int
    sequences: int | None = None
    hidden_size: int | None = None
    has_adapters: bool = False
    is_cuda: bool = False
    largest_weight: int = 0
    weights_at_once: int = 0


def values_of(train: TrainSection, facts: RunFacts) -> Expected:
    """What the recipe says about keys of DeepSpeed."""
    batch = facts.sequences or 1
    found: dict[str, tuple[Any, str]] = {
        "gradient_accumulation_steps": (facts.micro_batches, "train.accumulation (or parallel.micro_batches)"),
        "gradient_clipping": (train.max_grad_norm, "train.max_grad_norm"),
        "bf16.enabled": (train.precision == "bfloat16", f"train.precision {train.precision}"),
        "fp16.enabled": (train.precision == "float16", f"train.precision {train.precision}"),
        "optimizer.params.lr": (facts.learning_rate, "train.learning_rate"),
        "optimizer.params.weight_decay": (train.weight_decay, "train.weight_decay"),
        "scheduler.params.warmup_min_lr": (0, "train.schedule, whose warm-up begins at 0"),
        "scheduler.params.warmup_max_lr": (facts.learning_rate, "train.learning_rate"),
        "scheduler.params.warmup_num_steps": (facts.warmup_steps, "train.warmup_ratio"),
        "scheduler.params.total_num_steps": (facts.total_steps, "train.max_steps (or train.epochs)"),
    }
    if train.optimizer != "sgd":
        found["optimizer.params.betas"] = ([train.beta1, train.beta2], "train.beta1 and train.beta2")
        found["optimizer.params.eps"] = (train.eps, "train.eps")
    per_device = "train.micro_batch_tokens / data.max_length"
    found["train_micro_batch_size_per_gpu"] = (batch, per_device)
    product = batch * facts.micro_batches * facts.world_size
    found["train_batch_size"] = (product, f"{per_device} x train.accumulation x {facts.world_size} processes")
    return found


def refuse_foreign(file: JsonFile) -> None:
    """Raises: RecipeError for what tunesmith does itself, or can't do with DeepSpeed."""
    for key, (value, reason) in _FOREIGN.items():
        got = _look_up(file.value, key)
        if got is not _MISSING and got == value and type(got) is type(value):
            raise RecipeError(f"{file.where(*key.split('.'))}: {key} is {_shown(got)}: {reason}")
    for key, instead in _ONE_ONLY.items():
        got = _look_up(file.value, key)
        if isinstance(got, int) and got > 1:
            raise RecipeError(f"{file.where(*key.split('.'))}: {key} is {got}: leave it out, or use {instead}")
    if "zero_optimization" not in file.value:
        raise RecipeError(f"{file.path} has no zero_optimization: tunesmith uses DeepSpeed for its ZeRO stages 1 to 3")
    if _look_up(file.value, "zero_optimization.stage") not in (1, 2, 3):
        raise RecipeError(f"{file.where('zero_optimization')}: zero_optimization.stage must be 1, 2 or 3")


def check_against(file: JsonFile, expected: Expected, parallel: ParallelSection, train: TrainSection) -> None:
    """Raises: RecipeError naming both keys and values where the file and the recipe differ."""
    for key, (value, source) in expected.items():
        got = _look_up(file.value, key)
        if got in (_MISSING, "auto") or _same(got, value):
            continue
        raise _differs(file, key, got, value, source)
    _check_schedule(file, train)
    _check_places(file, parallel)


def _check_schedule(file: JsonFile, train: TrainSection) -> None:
    kind = _look_up(file.value, "scheduler.type")
    if kind in (_MISSING, None):
        return
    schedule = _SCHEDULES.get(str(kind).lower())
    if schedule is None:
        names = "WarmupLR (constant), WarmupDecayLR (linear) or WarmupCosineLR (cosine)"
        raise RecipeError(f"{file.where('scheduler', 'type')}: scheduler.type {kind} is none of {names}: leave it out")
    if schedule != train.schedule:
        raise _differs(file, "scheduler.type", kind, train.schedule, "train.schedule")
    if _look_up(file.value, "scheduler.params.warmup_type") == "log":
        raise _differs(file, "scheduler.params.warmup_type", "log", "linear", "train.schedule, whose warm-up")


def _check_places(file: JsonFile, parallel: ParallelSection) -> None:
    stage = _look_up(file.value, "zero_optimization.stage")
    if parallel.strategy != "auto" and parallel.strategy != f"zero{stage}":
        raise _differs(file, "zero_optimization.stage", stage, parallel.strategy, "parallel.strategy")
    if parallel.offload == "none":  # the default, which says nothing about the file
        return
    key = "zero_optimization.offload_optimizer.device"
    device = _look_up(file.value, key)
    if device != parallel.offload:
        raise _differs(file, key, "none" if device is _MISSING else device, parallel.offload, "parallel.offload")


def _differs(file: JsonFile, key: str, got: Any, value: Any, source: str) -> RecipeError:
    return RecipeError(
        f"{file.where(*key.split('.'))}: {key} is {_shown(got)}, and the recipe's {source} makes it {_shown(value)}: "
        f'make them agree, or write "auto"'
    )


def _look_up(value: Mapping[str, Any], key: str) -> Any:
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return _MISSING
        value = value[name]
    return value


def _same(got: Any, value: Any) -> bool:
    if isinstance(value, bool) or isinstance(got, bool):
        return got is value
    if isinstance(value, list):
        return isinstance(got, list) and len(got) == len(value) and all(map(_same, got, value))
    return isinstance(got, int | float) and math.isclose(got, value, rel_tol=1e-9)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

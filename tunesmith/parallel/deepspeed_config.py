"""What DeepSpeed is told: made from a recipe, or a user's ds_config.json with its autos resolved from the recipe.

A file is taken as it is. Where it says nothing, the recipe decides; where it says "auto", too; where it says something
else than the recipe, that is an error. DeepSpeed counts sequences, tunesmith packs: a micro-batch of
train.micro_batch_tokens counts as so many sequences of data.max_length as it holds.
Source: DeepSpeed's "Configuration JSON", and "auto" as transformers' DeepSpeed integration documents it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tunesmith.errors import RecipeError
from tunesmith.parallel.deepspeed_conflicts import RunFacts, check_against, refuse_foreign, values_of
from tunesmith.parallel.deepspeed_json import JsonFile, read_commented_json
from tunesmith.recipe.parallel import ParallelSection
from tunesmith.recipe.schema import TrainSection
from tunesmith.units import ceil_div

AUTO = "auto"
BUCKET_ELEMENTS = 200_000_000  # about a block of a model of 7B parameters: gathered, and reduced, at a time
OWN_OPTIMIZERS: dict[str, tuple[str, ...]] = {"adamw": ("adam", "adamw", "fusedadam", "cpuadam"), "sgd": ("sgd",)}
"""Types of a file's optimiser that tunesmith makes itself, by torch's fused ones, so that nothing is compiled."""
_SMALLEST_BUFFER = 1 << 20
_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


@dataclass(frozen=True)
class ZeroConfig:
    """DeepSpeed's configuration, every auto resolved.

    own_optimizer: tunesmith makes the optimiser; else DeepSpeed does, from `values`. notes: what was taken over from a
    file by tunesmith, in plain words. source: the file.
    """

    values: dict[str, Any]
    own_optimizer: Literal["adamw", "sgd"] | None
    notes: tuple[str, ...] = ()
    source: Path | None = None

    @property
    def stage(self) -> int:
        """ZeRO's stage."""
        return int(self.values["zero_optimization"]["stage"])

    def offload_device(self, what: Literal["optimizer", "param"]) -> str:
        """Where optimiser states or weights wait: none, cpu or nvme."""
        section = self.values["zero_optimization"].get(f"offload_{what}") or {}
        return str(section.get("device", "none"))

    @property
    def uses_nvme(self) -> bool:
        """Whether anything waits on a disk."""
        return "nvme" in (self.offload_device("optimizer"), self.offload_device("param"))


def make_config(parallel: ParallelSection, train: TrainSection, facts: RunFacts) -> ZeroConfig:
    """The configuration of a resolved recipe. Raises: RecipeError, for a file with its line and both keys' values."""
    if train.optimizer == "adamw8bit" or train.optimizer_in_backward:
        key = "optimizer adamw8bit" if train.optimizer == "adamw8bit" else "optimizer_in_backward"
        raise RecipeError(f"train.{key} is for parallel.engine native: DeepSpeed shards torch's optimisers only")
    if train.offload_optimizer:
        raise RecipeError(
            "train.offload_optimizer is for parallel.engine native: set it to false, and parallel.offload to cpu"
        )
    if parallel.deepspeed_config is None:
        return _resolved(JsonFile(Path("the recipe"), _from_recipe(parallel, train, facts)), parallel, train, facts)
    file = read_commented_json(Path(parallel.deepspeed_config))
    refuse_foreign(file)
    return _resolved(file, parallel, train, facts)


def zero_stage(parallel: ParallelSection, has_adapters: bool) -> int:
    """The stage of parallel.strategy; auto: 1 for adapters, whose states are small, else 3."""
    if parallel.strategy == "ddp":
        raise RecipeError(
            "parallel.strategy ddp goes with parallel.engine native (DeepSpeed without ZeRO is plain data "
            "parallelism): set it to zero1, zero2, zero3 or auto"
        )
    if parallel.strategy != "auto":
        return _STAGES[parallel.strategy]
    return 1 if has_adapters and parallel.offload == "none" else 3


def _from_recipe(parallel: ParallelSection, train: TrainSection, facts: RunFacts) -> dict[str, Any]:
    stage = zero_stage(parallel, facts.has_adapters)
    if parallel.offload == "nvme" and stage != 3:
        raise RecipeError(f"parallel.offload nvme goes with parallel.strategy zero3, not with {parallel.strategy}")
    if train.precision == "bfloat16" and train.master_weights == "compute":
        raise RecipeError(
            "train.master_weights compute (pure bfloat16) goes with parallel.engine native: DeepSpeed has it with its "
            "own compiled CPU optimiser only; set it to float32, or name a file in parallel.deepspeed_config"
        )
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": stage > 1,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        **_offloads(parallel, stage, facts),
    }
    if stage == 3:
        zero["stage3_prefetch_bucket_size"] = BUCKET_ELEMENTS
    made: dict[str, Any] = {"zero_optimization": zero}
    if train.precision == "bfloat16" and facts.micro_batches > 1 and stage > 1:
        made["data_types"] = {"grad_accum_dtype": "fp32"}  # the sum of several micro-batches loses nothing
    return made


def _offloads(parallel: ParallelSection, stage: int, facts: RunFacts) -> dict[str, Any]:
    if parallel.offload == "none":
        return {}
    place: dict[str, Any] = {"device": parallel.offload, "pin_memory": facts.is_cuda}
    if parallel.offload == "nvme":
        place["nvme_path"] = parallel.offload_folder
    sections = {"offload_optimizer": dict(place), **({"offload_param": dict(place)} if stage == 3 else {})}
    if parallel.offload == "nvme":
        sections["offload_param"] |= _buffers(facts)
    return sections


def _buffers(facts: RunFacts) -> dict[str, int]:
    """Host memory that weights pass through from NVMe. DeepSpeed fails where a share is larger than a buffer (of 1e8
    values if nothing is said), or where a block needs more than there are (5)."""
    share = max(ceil_div(facts.largest_weight, facts.world_size), _SMALLEST_BUFFER)
    return {"buffer_size": share, "buffer_count": max(facts.weights_at_once, 5)}


def _resolved(file: JsonFile, parallel: ParallelSection, train: TrainSection, facts: RunFacts) -> ZeroConfig:
    """Fill in what is auto or missing, check the rest, and take out what tunesmith does itself."""
    if facts.sequences is None:
        given = file.value.get("train_micro_batch_size_per_gpu")
        facts = replace(facts, sequences=given if isinstance(given, int) else 1)
    expected = values_of(train, facts)
    check_against(file, expected, parallel, train)
    values = _filled(file.value, {key: value for key, (value, _) in expected.items()}, facts)
    _refuse_autos(file, values, ())
    notes: list[str] = []
    own = _take_optimizer(values, train, notes)
    if values.pop("scheduler", None) is not None:
        notes.append(f"the learning rate is set in every step by train.schedule {train.schedule}")
    values.setdefault("steps_per_print", 2**31 - 1)
    source = None if parallel.deepspeed_config is None else file.path
    return ZeroConfig(values, own, tuple(notes), source)


def _filled(given: Mapping[str, Any], expected: Mapping[str, Any], facts: RunFacts) -> dict[str, Any]:
    """A copy with every auto that is known resolved, and what the recipe decides put in where it is missing."""
    out = _copy(given)
    for key, value in {**expected, **_bucket_sizes(facts)}.items():
        *path, last = key.split(".")
        section = out
        for name in path:
            section = section.get(name, {}) if path[0] in ("optimizer", "scheduler") else section.setdefault(name, {})
            if not isinstance(section, dict):
                raise RecipeError(f"{name} of DeepSpeed's configuration must be an object {{...}}, got {section!r}")
        is_optional = key.startswith(("optimizer.", "scheduler.")) or key in _bucket_sizes(facts)
        if section.get(last) == AUTO or (last not in section and not is_optional):
            section[last] = value
    return out


def _bucket_sizes(facts: RunFacts) -> dict[str, int]:
    """transformers' formulas for autos that go by the model's width D: D^2, 0.9 D^2, 10 D."""
    width = facts.hidden_size or 1024
    return {
        "zero_optimization.reduce_bucket_size": width * width,
        "zero_optimization.stage3_prefetch_bucket_size": int(0.9 * width * width),
        "zero_optimization.stage3_param_persistence_threshold": 10 * width,
    }


def _take_optimizer(values: dict[str, Any], train: TrainSection, notes: list[str]) -> Literal["adamw", "sgd"] | None:
    """Take an optimiser out that tunesmith makes; one that only DeepSpeed has stays."""
    kind = str((values.get("optimizer") or {}).get("type", "")).lower()
    own: Literal["adamw", "sgd"] = "sgd" if train.optimizer == "sgd" else "adamw"
    if kind and kind not in OWN_OPTIMIZERS[own]:
        notes.append(f"the optimiser is DeepSpeed's {values['optimizer']['type']}")
        return None
    if values.pop("optimizer", None) is not None:
        notes.append(f"the optimiser is torch's fused {'SGD' if own == 'sgd' else 'AdamW'}, which needs no compiler")
    values["zero_allow_untested_optimizer"] = True
    values["zero_force_ds_cpu_optimizer"] = False
    return own


def _refuse_autos(file: JsonFile, value: Any, place: tuple[str | int, ...]) -> None:
    if value == AUTO:
        raise RecipeError(
            f"{file.where(*place)}: {'.'.join(map(str, place))} is 'auto', and the recipe decides nothing of that "
            f"name: write its value, or leave it out"
        )
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        _refuse_autos(file, inner, (*place, key))


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value

"""What `accelerate launch` says in the environment, as the recipe's section `parallel`.

accelerate hands its configuration file to the processes as variables. Those that say how weights are divided are read
here; the others (precision, accumulation, clipping) are the recipe's business, and named where they are passed over.
Source: accelerate's utils/launch.py, which sets the variables.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from tunesmith.errors import ParallelError, RecipeError
from tunesmith.recipe.parallel import ParallelSection

_log = logging.getLogger(__name__)
Environment = Mapping[str, str]
_SHARDING = {
    "FULL_SHARD": "zero3",
    "1": "zero3",
    "TRUE": "zero3",
    "SHARD_GRAD_OP": "zero2",
    "2": "zero2",
    "FALSE": "zero2",
    "NO_SHARD": "ddp",
    "3": "ddp",
    "NO_RESHARD": "ddp",
}
_PASSED_OVER = {
    "ACCELERATE_MIXED_PRECISION": "train.precision",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "train.accumulation",
    "ACCELERATE_GRADIENT_CLIPPING": "train.max_grad_norm",
    "FSDP_ACTIVATION_CHECKPOINTING": "train.checkpointing",
}
_NOTHING = ("", "no", "none", "false", "1", "auto")


def from_accelerate(environment: Environment, settings: ParallelSection) -> tuple[ParallelSection, tuple[str, ...]]:
    """`settings` with what accelerate was configured for, and what was done, in plain words.

    Without accelerate's variables: as it is, and nothing. Raises: RecipeError when the recipe says something else;
    ParallelError for what tunesmith does not have.
    """
    found: dict[str, tuple[Any, str]] = {}
    if _is_on(environment, "ACCELERATE_USE_MEGATRON_LM"):
        raise ParallelError(
            "accelerate is configured for Megatron-LM: run `accelerate config` for DeepSpeed or FSDP, or set "
            "parallel.tensor and parallel.pipeline in the recipe and start with tunesmith launch"
        )
    if _is_on(environment, "ACCELERATE_USE_DEEPSPEED"):
        found.update(_of_deepspeed(environment))
    elif _is_on(environment, "ACCELERATE_USE_FSDP"):
        found.update(_of_fsdp(environment))
    if _is_on(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        found.update(_of_mesh(environment))
    if not found:
        return settings, ()
    for key, (value, variable) in found.items():
        _check_agrees(settings, key, value, variable)
    values = {**settings.model_dump(), **{key: value for key, (value, _) in found.items()}}
    notes = [f"accelerate's {variable}: parallel.{key} is {value}" for key, (value, variable) in found.items()]
    try:
        section = ParallelSection(**values)
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise RecipeError(f"accelerate's configuration and the recipe don't go together: {reason}") from None
    return section, (*notes, *_passed_over(environment))


def with_accelerate(settings: ParallelSection, environment: Environment) -> ParallelSection:
    """`from_accelerate`; the first process says what was done. Raises: as that."""
    found, notes = from_accelerate(environment, settings)
    if environment.get("RANK", "0") == "0":
        for note in notes:
            _log.warning("%s", note)
    return found


def _of_deepspeed(environment: Environment) -> dict[str, tuple[Any, str]]:
    prefix = "ACCELERATE_DEEPSPEED_"
    found: dict[str, tuple[Any, str]] = {"engine": ("deepspeed", "ACCELERATE_USE_DEEPSPEED")}
    file = environment.get(f"{prefix}CONFIG_FILE", "none")
    if file.lower() != "none":
        found["deepspeed_config"] = (file, f"{prefix}CONFIG_FILE")
        return found
    stage = environment.get(f"{prefix}ZERO_STAGE", "2")
    if stage not in ("1", "2", "3"):
        raise ParallelError(
            f"{prefix}ZERO_STAGE is {stage}: tunesmith uses DeepSpeed for ZeRO 1, 2 and 3; for plain data parallelism "
            f"choose multi-GPU in `accelerate config`"
        )
    found["strategy"] = (f"zero{stage}", f"{prefix}ZERO_STAGE")
    for what in ("OFFLOAD_OPTIMIZER", "OFFLOAD_PARAM"):
        device = environment.get(f"{prefix}{what}_DEVICE", "none").lower()
        if device not in ("none", ""):
            found["offload"] = (device, f"{prefix}{what}_DEVICE")
        folder = environment.get(f"{prefix}{what}_NVME_PATH", "none")
        if device == "nvme" and folder.lower() != "none":
            found["offload_folder"] = (folder, f"{prefix}{what}_NVME_PATH")
    return found


def _of_fsdp(environment: Environment) -> dict[str, tuple[Any, str]]:
    is_second = environment.get("FSDP_VERSION", "1") == "2"
    variable = "FSDP_RESHARD_AFTER_FORWARD" if is_second else "FSDP_SHARDING_STRATEGY"
    given = environment.get(variable, "true" if is_second else "FULL_SHARD")
    if given.upper() not in _SHARDING:
        raise ParallelError(f"{variable} is {given}: tunesmith has FULL_SHARD, SHARD_GRAD_OP and NO_SHARD")
    found: dict[str, tuple[Any, str]] = {"engine": ("native", "ACCELERATE_USE_FSDP")}
    found["strategy"] = (_SHARDING[given.upper()], variable)
    if _is_on(environment, "FSDP_OFFLOAD_PARAMS"):
        found["offload"] = ("cpu", "FSDP_OFFLOAD_PARAMS")
    return found


def _of_mesh(environment: Environment) -> dict[str, tuple[Any, str]]:
    prefix = "PARALLELISM_CONFIG_"
    for name in ("CP_SIZE", "SP_SIZE"):
        if environment.get(f"{prefix}{name}", "1") not in ("1", ""):
            raise ParallelError(
                f"{prefix}{name} is {environment[prefix + name]}: tunesmith divides no sequence among processes yet; "
                f"set it to 1, and {prefix}TP_SIZE, or the recipe's train.checkpointing: offload"
            )
    size = environment.get(f"{prefix}TP_SIZE", "1")
    return {"tensor": (int(size), f"{prefix}TP_SIZE")} if size.isdecimal() and int(size) > 1 else {}


def _check_agrees(settings: ParallelSection, key: str, value: Any, variable: str) -> None:
    """A key that the recipe leaves at its default says nothing."""
    ours, default = getattr(settings, key), ParallelSection.model_fields[key].default
    if ours not in (default, value):
        raise RecipeError(
            f"the recipe's parallel.{key} is {ours}, and accelerate's {variable} makes it {value}: change one of them"
        )


def _passed_over(environment: Environment) -> list[str]:
    given = {name: environment.get(name, "") for name in _PASSED_OVER}
    return [
        f"accelerate's {name} {value} is not read: the recipe's {_PASSED_OVER[name]} decides"
        for name, value in given.items()
        if value.lower() not in _NOTHING
    ]


def _is_on(environment: Environment, name: str) -> bool:
    return environment.get(name, "").lower() in ("true", "1", "yes")

"""Every "auto" of a recipe that training depends on becomes a value, in a new recipe."""

from __future__ import annotations

from typing import cast

import torch

from tunesmith.arch import read_config, read_raw_config
from tunesmith.checkpoint.source import resolve_model
from tunesmith.cost.memory import DTypeName, keeps_outer_blocks
from tunesmith.errors import DeviceError, RecipeError, UnsupportedModelError
from tunesmith.hardware import pick_device, supports_bf16
from tunesmith.kernels.fp8 import require_fp8
from tunesmith.parallel.apply import resolve_strategy
from tunesmith.parallel.mesh import mesh_shape
from tunesmith.recipe.schema import MethodSection, Recipe, TrainSection
from tunesmith.train.optimizer_offload import ONE_PROCESS, require_gpu
from tunesmith.units import ceil_div

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REFERENCE_RATE, REFERENCE_WIDTH = 2e-4, 2048
LEAST_TOKENS = {"cpu": 2048, "cuda": 8192}


def resolve_recipe(recipe: Recipe, world_size: int = 1) -> Recipe:
    """`recipe` with device, precision, dtypes and micro_batch_tokens decided; a resolved recipe is returned as it is.

    world_size: the processes of the run; of several, the micro-batches of a step are decided too, and blocks are
    launched one by one. Raises: DeviceError when the device can't do what is asked; RecipeError, ParallelError.
    """
    device = torch.device(pick_device(recipe.model.device))
    if recipe.method.uses_fp8:
        require_fp8(device)
    _require_gpu_to_offload(recipe, device)
    train = _resolve_train(recipe, device)
    dtype = weight_dtype(recipe, train)
    model = recipe.model.model_copy(update={"device": str(device), "dtype": dtype})
    method = _resolve_method(recipe, cast(DTypeName, dtype))
    resolved = recipe.model_copy(update={"model": model, "method": method, "train": train})
    return resolved if world_size == 1 else _resolve_parallel(resolved, world_size)


def _resolve_parallel(recipe: Recipe, world_size: int) -> Recipe:
    """What several processes need decided, and what they can't do."""
    train, parallel = recipe.train, recipe.parallel
    if train.optimizer_in_backward:
        raise RecipeError(
            "train.optimizer_in_backward frees gradients before the processes could sum them: set it to false, and use "
            "parallel.strategy zero3 to save memory"
        )
    if train.offload_optimizer:
        raise RecipeError(ONE_PROCESS)
    _, data, _ = mesh_shape(parallel, world_size)
    settled: dict[str, object] = {"micro_batches": parallel.micro_batches or train.accumulation * data}
    if parallel.engine == "native":  # a ds_config.json may name the stage, too
        settled["strategy"] = resolve_strategy(parallel, has_adapters=recipe.method.kind in ("lora", "qlora"))
    return recipe.model_copy(
        update={
            "train": train.model_copy(update={"graphs": "off"}),
            "parallel": parallel.model_copy(update=settled),
        }
    )


def _resolve_method(recipe: Recipe, weight_dtype: DTypeName) -> MethodSection:
    """The method with the blocks of an fp8 base decided. A family that is not known here keeps no block wide."""
    method = recipe.method
    if method.base != "fp8" or method.fp8_blocks != "auto":
        return method
    try:
        config = read_config(resolve_model(recipe.model.path, recipe.model.revision))
    except UnsupportedModelError:
        return method.model_copy(update={"fp8_blocks": "all"})
    return method.model_copy(update={"fp8_blocks": "inner" if keeps_outer_blocks(config, weight_dtype) else "all"})


def _require_gpu_to_offload(recipe: Recipe, device: torch.device) -> None:
    if recipe.train.offload_optimizer:
        require_gpu(device)
    if recipe.train.checkpointing in ("offload", "offload-block") and device.type != "cuda":
        raise DeviceError(
            f"train.checkpointing '{recipe.train.checkpointing}' moves activations from a GPU to the host, and the "
            f"device is {device}: use --set train.checkpointing=selective"
        )


def trained_dtype(train: TrainSection) -> torch.dtype:
    """The dtype of trained weights and their optimiser states."""
    return DTYPES[train.precision if train.master_weights == "compute" else "float32"]


def trains_base(method: MethodSection) -> bool:
    """Whether weights of the model itself are trained."""
    return method.kind in ("full", "freeze")


def _resolve_train(recipe: Recipe, device: torch.device) -> TrainSection:
    train = recipe.train
    precision = train.precision
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" and supports_bf16(device) else "float32"
    elif precision == "bfloat16" and device.type == "cuda" and not supports_bf16(device):
        raise DeviceError(f"{device} has no bfloat16: use --set train.precision=float16, or float32")
    master = "float32" if train.master_weights == "auto" else train.master_weights
    tokens = train.micro_batch_tokens or default_tokens(recipe.data.max_length, device)
    values = {"precision": precision, "master_weights": master, "micro_batch_tokens": tokens}
    return train.model_copy(update={**values, "learning_rate": _learning_rate(recipe)})


def _learning_rate(recipe: Recipe) -> float:
    """The recipe's peak; else one that falls with the model's width, a tenth of it for the model's own weights.

    Source: the best rate of AdamW goes as 1 / width (arXiv 2203.03466, table 8), and adapters' is about ten times
    that of full fine-tuning whatever the size (Schulman et al., "LoRA Without Regret", 2025); anchored at the usual
    2e-4 for adapters at a width of 2048.
    """
    if recipe.train.learning_rate is not None:
        return recipe.train.learning_rate
    raw = read_raw_config(resolve_model(recipe.model.path, recipe.model.revision))
    width = raw.get("hidden_size") or raw.get("n_embd") or raw.get("d_model") or REFERENCE_WIDTH
    rate = min(max(REFERENCE_RATE * REFERENCE_WIDTH / int(width), 5e-5), 2e-3)
    return rate / 10 if trains_base(recipe.method) else rate


def default_tokens(max_length: int, device: torch.device) -> int:
    """The smallest multiple of the longest document that holds the device's least."""
    return max_length * ceil_div(LEAST_TOKENS.get(device.type, LEAST_TOKENS["cuda"]), max_length)


def weight_dtype(recipe: Recipe, train: TrainSection) -> str:
    """Frozen weights are held as they are computed with: a cast at each use would hold two copies of them."""
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    if trains_base(recipe.method) and train.master_weights == "float32":
        return "float32"
    return train.precision

"""Models out: a Hugging Face safetensors directory that transformers loads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tunesmith.checkpoint.files import INDEX, SINGLE
from tunesmith.checkpoint.names import LAYOUTS, tensor_names
from tunesmith.errors import ModelError
from tunesmith.model.decoder import Decoder
from tunesmith.rundir.io import system_errors, write_json_atomic
from tunesmith.units import GB

MAX_SHARD_BYTES = 4 * GB


def tensors_of(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's name and tensor of everything the checkpoint holds, in the decoder's order.

    Quantised linears give their dequantised weight. Raises: ModelError when adapters are not merged.
    """
    for item in tensor_names(decoder):
        module: Any = decoder.get_submodule(item.module)
        if item.part is None:
            yield item.name, getattr(module, item.kind).detach()
            continue
        if not hasattr(module, "part_weight"):
            raise ModelError(f"{item.module} carries an adapter: save the adapter, or merge it first (tunesmith merge)")
        tensor = module.part_weight(item.part) if item.kind == "weight" else module.bias[module.rows(item.part)]
        yield item.name, (tensor.t() if item.transposed else tensor).detach()


def save_decoder(
    decoder: Decoder, directory: Path, *, dtype: torch.dtype | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write config.json and safetensors (one file, or shards of at most `max_shard_bytes` and their index).

    Args: dtype: converted to; None keeps each tensor's.
    Every file appears whole or not at all; at most one shard is held in memory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    plan = plan_shards(decoder, dtype or decoder.embedding.weight.dtype, max_shard_bytes)
    tensors = tensors_of(decoder)
    for index, names in enumerate(plan):
        shard = {name: _on_host(tensor, dtype) for name, tensor in (next(tensors) for _ in names)}
        save_shard(shard, directory / shard_name(index, len(plan)))
    if len(plan) > 1:
        write_index(directory, decoder, plan, dtype or decoder.embedding.weight.dtype)
    write_json_atomic(directory / "config.json", saved_config(decoder, dtype))
    _forget_others(directory, {shard_name(index, len(plan)) for index in range(len(plan))})


def saved_config(decoder: Decoder, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The content of config.json: as it was read, with the dtype now stored and without a quantisation undone."""
    raw = {key: value for key, value in decoder.config.raw.items() if key not in ("torch_dtype", "quantization_config")}
    raw.setdefault("architectures", [LAYOUTS[decoder.config.family].architecture])
    raw["dtype"] = str(dtype or decoder.embedding.weight.dtype).removeprefix("torch.")
    return raw


def plan_shards(decoder: Decoder, dtype: torch.dtype, max_shard_bytes: int) -> list[list[str]]:
    """The tensor names of each shard, in order."""
    plan: list[list[str]] = [[]]
    used = 0
    for item in tensor_names(decoder):
        size = _num_bytes(item.shape, dtype)
        if plan[-1] and used + size > max_shard_bytes:
            plan.append([])
            used = 0
        plan[-1].append(item.name)
        used += size
    return plan


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return int(torch.Size(shape).numel()) * dtype.itemsize


def _on_host(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """An own, contiguous copy: projections are views of a fused weight, which safetensors refuses."""
    return tensor.to("cpu", dtype or tensor.dtype).clone(memory_format=torch.contiguous_format)


def shard_name(index: int, num_shards: int) -> str:
    """The file name of one shard of a checkpoint."""
    return SINGLE if num_shards == 1 else f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"


def _forget_others(directory: Path, kept: set[str]) -> None:
    """Remove an older model's weights, so that no reader mixes the two."""
    index = [directory / INDEX] if len(kept) == 1 else []
    for path in [*index, directory / SINGLE, *directory.glob("model-*-of-*.safetensors")]:
        if path.name not in kept:
            path.unlink(missing_ok=True)


def save_shard(shard: dict[str, Tensor], path: Path) -> None:
    """Write one safetensors file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with system_errors():
            save_file(shard, temporary, metadata={"format": "pt"})
        _publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_index(directory: Path, decoder: Decoder, plan: list[list[str]], dtype: torch.dtype) -> None:
    """Write the index that says in which shard each tensor is."""
    total = sum(_num_bytes(item.shape, dtype) for item in tensor_names(decoder))
    weight_map = {name: shard_name(index, len(plan)) for index, names in enumerate(plan) for name in names}
    write_json_atomic(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _publish(temporary: Path, path: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)

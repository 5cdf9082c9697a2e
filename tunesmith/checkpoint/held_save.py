"""Decoders whose linears are held in int8 or int4, out to a directory that `held_files` reads back as it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.checkpoint.files import INDEX
from tunesmith.checkpoint.held_files import OURS, VERSION
from tunesmith.checkpoint.names import TensorName, tensor_names
from tunesmith.checkpoint.save import MAX_SHARD_BYTES, save_shard, saved_config, shard_name
from tunesmith.errors import ModelError
from tunesmith.model.decoder import Decoder
from tunesmith.model.held import HeldLinear
from tunesmith.model.int4 import Int4Linear
from tunesmith.model.int8 import Int8Linear
from tunesmith.model.weight_formats import WeightFormat
from tunesmith.rundir.io import write_json_atomic


def save_held(
    decoder: Decoder,
    directory: Path,
    held: WeightFormat,
    *,
    notes: dict[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write config.json and safetensors into an existing directory; returns the bytes of the tensors.

    notes: what else the quantisation section says (how it was calibrated). Raises: ModelError where adapters are left.
    """
    shards: list[dict[str, Tensor]] = [{}]
    used = total = 0
    for name, tensor in _tensors(decoder):
        if shards[-1] and used + tensor.nbytes > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used, total = used + tensor.nbytes, total + tensor.nbytes
    for index, shard in enumerate(shards):
        whole = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in shard.items()}
        save_shard(whole, directory / shard_name(index, len(shards)))
    if len(shards) > 1:
        places = {name: shard_name(i, len(shards)) for i, shard in enumerate(shards) for name in shard}
        write_json_atomic(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    section = {"quant_method": OURS, "version": VERSION, "format": held.to_json(), "head": _head_name(decoder)}
    config = {**saved_config(decoder), "quantization_config": {**section, **(notes or {})}}
    write_json_atomic(directory / "config.json", config)
    return total


def _tensors(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    tied = decoder.config.tie_word_embeddings
    for item in tensor_names(decoder):
        module: Any = decoder.get_submodule(item.module)
        if tied and item.module == "head":
            continue  # made of the embedding again
        if item.part is None:
            yield item.name, getattr(module, item.kind).detach()
        elif item.kind == "bias":
            yield item.name, module.bias[module.rows(item.part)].detach()
        elif isinstance(module, HeldLinear):
            yield from _held_tensors(item, module)
        elif hasattr(module, "part_weight"):
            weight = module.part_weight(item.part).detach()
            yield item.name, weight.t() if item.transposed else weight
        else:
            raise ModelError(f"{item.module} carries an adapter: merge it first (tunesmith merge)")


def _held_tensors(item: TensorName, linear: HeldLinear) -> Iterator[tuple[str, Tensor]]:
    assert item.part is not None
    prefix = item.name.removesuffix(".weight")
    if isinstance(linear, Int8Linear):
        int8 = linear.part_held(item.part)
        yield from ((f"{prefix}.codes", int8.codes), (f"{prefix}.scale", int8.scale))
        return
    if not isinstance(linear, Int4Linear) or linear.order is not None:
        raise ModelError(f"{item.module} sorts its columns by activation (GPTQ's desc_act), which is not saved again")
    int4 = linear.part_held(item.part)
    yield from ((f"{prefix}.words", int4.words), (f"{prefix}.scales", int4.scales))
    if int4.zeros is not None:
        yield f"{prefix}.zeros", int4.zeros


def _head_name(decoder: Decoder) -> str:
    return "int8" if isinstance(decoder.head, HeldLinear) else "stored"

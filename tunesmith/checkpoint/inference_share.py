"""Models in for inference by processes that share them: each loads its part, in every weight format there is.

The values stay those of one process: what is read whole and quantised is cut afterwards, one projection at a time; of
what is not in codes yet a process reads its part, as far as that decides what it holds (`parallel/own_boxes.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from tunesmith.arch import ModelConfig, read_config
from tunesmith.checkpoint.files import WeightFiles
from tunesmith.checkpoint.held_files import OURS, HeldFiles, HeldWeights, held_method
from tunesmith.checkpoint.load import DTYPES, CheckpointWeights, Quantize, RandomWeights, load_decoder
from tunesmith.checkpoint.names import TensorName, tensor_names
from tunesmith.checkpoint.own_part import boxes_of_own, load_own
from tunesmith.checkpoint.quantized_load import HeldSource
from tunesmith.errors import ModelError
from tunesmith.kernels.fp8 import has_fp8, without_products
from tunesmith.model.decode_linears import hold_head_in_int8
from tunesmith.model.decoder import Decoder
from tunesmith.model.held import HeldLinear
from tunesmith.model.quant import set_compute
from tunesmith.model.uncompiled import import_kernels
from tunesmith.model.weight_formats import hold_linears, parse_format
from tunesmith.parallel.held_linears import load_share_of, share_of
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.shard_linears import is_cut, load_part
from tunesmith.parallel.tensor import share_linears

_log = logging.getLogger(__name__)

Weights = Literal["checkpoint", "random"]


def load_share_for_inference(
    directory: Path,
    mesh: Mesh,
    *,
    quantize: str | None = None,
    dtype: torch.dtype | None = None,
    weights: Weights = "checkpoint",
    seed: int = 0,
) -> Decoder:
    """This process's part of a model, on the device of `mesh`; `quantize` and what is stored as `load_for_inference`.

    Raises: ParallelError naming what can't be divided; ModelError; UnsupportedModelError for a family that the native
    decoder does not have.
    """
    config = read_config(directory)
    held = None if quantize is None else parse_format(quantize)
    stored = held_method(config) if weights == "checkpoint" else None
    if stored is not None and quantize is not None:
        raise ModelError(
            f"{directory} is quantised already ({stored}): leave quantize out, or take the unquantised model"
        )
    if stored is None and held is None:
        trained = cast("Quantize | None", quantize)
        model = load_decoder(
            directory, device=mesh.device, dtype=dtype, weights=weights, quantize=trained, seed=seed, mesh=mesh
        )
        if quantize in ("fp8", "fp8-inner"):
            set_compute(model, "fp8" if has_fp8(mesh.device) else "weights")
            if mesh.rank == 0 and (note := without_products(mesh.device)) is not None:
                _log.warning("%s", note)
        return model
    has_int8_head = mesh.device.type == "cpu"  # as one process holds it there
    if stored is not None:
        files = HeldFiles(directory, mesh.device, config.raw["quantization_config"])
        has_int8_head |= files.method == OURS and files.section.get("head") == "int8"
        source = HeldWeights(files, config)
        model = _fill(config, source, dtype or source.dtype, mesh, source.replace_linears)
    else:
        assert held is not None
        made = _unquantised(directory, config, mesh, dtype, weights, seed)
        model = _fill(config, made, dtype or made.dtype, mesh, lambda decoder: hold_linears(decoder, held))
    if has_int8_head and not isinstance(model.head, HeldLinear):
        hold_head_in_int8(model)
    return model


def _unquantised(
    directory: Path, config: ModelConfig, mesh: Mesh, dtype: torch.dtype | None, weights: Weights, seed: int
) -> CheckpointWeights | RandomWeights:
    if weights == "checkpoint":
        return CheckpointWeights(WeightFiles(directory, mesh.device), config)
    named = DTYPES.get(str(config.raw.get("dtype") or config.raw.get("torch_dtype")), torch.float32)
    return RandomWeights(config, dtype or named, mesh.device, seed)


def _fill(
    config: ModelConfig, source: HeldSource, dtype: torch.dtype, mesh: Mesh, replace_linears: Callable[[Decoder], Any]
) -> Decoder:
    """This process's part of the decoder whose linears `replace_linears` exchanges on the meta device."""
    with torch.device("meta"):
        whole, decoder = Decoder(config).to(dtype), Decoder(config).to(dtype)
    wanted = list(tensor_names(decoder))
    source.check(wanted)
    replace_linears(whole)
    share_linears(decoder, mesh)
    for path, form in list(whole.named_modules()):
        if isinstance(form, HeldLinear):
            parent, _, name = path.rpartition(".")
            linear = decoder.get_submodule(path)
            own = share_of(form, linear, path) if is_cut(linear) else form
            setattr(decoder.get_submodule(parent), name, own)
    _give_storage(decoder, mesh.device)
    boxes = boxes_of_own(decoder, source, wanted)
    with source.reading_ahead(wanted, boxes):
        if mesh.device.type == "cuda":
            import_kernels()
        for (path, part), group in groupby(wanted, key=lambda item: (item.module, item.part)):
            items, module = list(group), decoder.get_submodule(path)
            if any(item.name in boxes for item in items):
                load_own(module, source, items)
            else:
                _put(module, part, source, items)
    return decoder.requires_grad_(False)


def _give_storage(module: nn.Module, device: torch.device) -> None:
    cast(Any, module)._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))


@torch.no_grad()
def _put(module: nn.Module, part: str | None, source: HeldSource, items: Sequence[TensorName]) -> None:
    tensors = {item.kind: source.read(item) for item in items}
    if part is None:
        for kind, tensor in tensors.items():
            getattr(module, kind).copy_(tensor)
    elif not is_cut(module):
        cast(Any, module).load_part(part, tensors["weight"], tensors.get("bias"))
    elif isinstance(module, HeldLinear):
        load_share_of(module, part, tensors["weight"], tensors.get("bias"))
    else:
        load_part(module, part, tensors["weight"], tensors.get("bias"), double=False)

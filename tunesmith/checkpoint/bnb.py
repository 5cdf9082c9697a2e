"""Checkpoints that bitsandbytes quantised to 4 bits: their NF4 codes and scales are taken over bit for bit.

NAME                                       uint8 codes, two to a byte, [F * D / 2, 1]
NAME.absmax                                scales: float32, or uint8 when doubly quantised
NAME.nested_absmax                         the scales' scales
NAME.quant_map, NAME.nested_quant_map      the tables of values: constants of the formats
NAME.quant_state.bitsandbytes__nf4         JSON as bytes: shape, dtype, block sizes, the scales' offset
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.arch import ModelConfig, read_config
from tunesmith.checkpoint.files import INDEX, WeightFiles
from tunesmith.checkpoint.names import tensor_names
from tunesmith.checkpoint.save import MAX_SHARD_BYTES, save_shard, shard_name
from tunesmith.errors import ModelError, UnsupportedModelError
from tunesmith.formats import FORMATS
from tunesmith.kernels.codebooks import dynamic_values, nf4_values
from tunesmith.kernels.nf4 import BLOCK, SCALE_BLOCK, NF4Weight, empty_nf4, quantize_nf4
from tunesmith.model.decoder import Decoder
from tunesmith.rundir.io import write_json_atomic

_STATE = ".quant_state.bitsandbytes__nf4"
_AUXILIARY = (".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map", _STATE)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_bnb_config(section: Mapping[str, Any], directory: Path) -> None:
    """Refuse a `quantization_config` that is not NF4 by bitsandbytes. Raises: UnsupportedModelError."""
    method = section.get("quant_method", "unknown")
    if method != "bitsandbytes":
        raise UnsupportedModelError(
            f"{directory} is quantised with {method!r}; natively only bitsandbytes' NF4 checkpoints are read"
        )
    is_4bit = section.get("load_in_4bit", section.get("_load_in_4bit"))
    kind = section.get("bnb_4bit_quant_type", "fp4") if is_4bit else "int8"
    if kind != "nf4":
        raise UnsupportedModelError(
            f"{directory} is quantised to bitsandbytes' {kind}; only nf4 is read: take the unquantised model and "
            f"method.kind qlora"
        )


class BnbFiles(WeightFiles):
    """The tensors of a bitsandbytes checkpoint: `read_nf4` for those that are quantised."""

    def __init__(self, directory: Path, device: torch.device | str = "cpu") -> None:
        super().__init__(directory, device)
        self._states = {n.removesuffix(_STATE): self._state(n) for n in super().names() if n.endswith(_STATE)}

    def names(self) -> list[str]:
        """The names of the weights, without what belongs to their quantisation."""
        return [name for name in super().names() if not name.endswith(_AUXILIARY)]

    def is_nf4(self, name: str) -> bool:
        """Whether a tensor is quantised."""
        return name in self._states

    def is_double(self, name: str) -> bool:
        """Whether a quantised tensor's scales are quantised too."""
        return "nested_offset" in self._states[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; of a quantised one [out, in], also where the model holds [in, out]."""
        return tuple(self._states[name]["shape"]) if name in self._states else super().shape(name)

    def read_nf4(self, name: str) -> NF4Weight:
        """A quantised weight as it is, on the device. Raises: ModelError when its tensors don't fit together."""
        state = self._states[name]
        rows, columns = self.shape(name)
        frame = empty_nf4((rows, columns), _DTYPES[state["dtype"]], self.is_double(name), "meta")
        self._check_table(f"{name}.quant_map", nf4_values(torch.device("cpu")))
        weight = NF4Weight(
            self._fitting(name, self.read(name).view(torch.uint8), frame.codes),
            self._fitting(f"{name}.absmax", self.read(f"{name}.absmax"), frame.scales),
            frame.shape,
            frame.dtype,
        )
        if frame.scale_scales is None:
            return weight
        self._check_table(f"{name}.nested_quant_map", dynamic_values(torch.device("cpu")))
        inner = f"{name}.nested_absmax"
        scale_scales = self._fitting(inner, self.read(inner), frame.scale_scales)
        offset = torch.tensor(float(state["nested_offset"]), device=self.device)
        return NF4Weight(weight.codes, weight.scales, frame.shape, frame.dtype, scale_scales, offset)

    def _state(self, name: str) -> dict[str, Any]:
        try:
            state = json.loads(bytes(self.read(name).cpu().tolist()))
            fits = state["quant_type"] == "nf4" and state["blocksize"] == BLOCK and state["dtype"] in _DTYPES
            fits = fits and state.get("nested_blocksize", SCALE_BLOCK) == SCALE_BLOCK and len(state["shape"]) == 2
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{name} in {self.directory} is no quantisation state: {error!r}") from None
        if not fits:
            raise UnsupportedModelError(
                f"{name} in {self.directory} is not NF4 of a matrix in blocks of {BLOCK} "
                f"with scales in blocks of {SCALE_BLOCK}: {state}"
            )
        return dict(state)

    def _fitting(self, name: str, tensor: Tensor, frame: Tensor) -> Tensor:
        if tensor.numel() != frame.numel() or tensor.dtype != frame.dtype:
            raise ModelError(
                f"{name} in {self.directory} holds {tensor.numel()} values of {tensor.dtype}, "
                f"its shape asks for {frame.numel()} of {frame.dtype}"
            )
        return tensor.reshape(frame.shape)

    def _check_table(self, name: str, expected: Tensor) -> None:
        if name not in self or not torch.equal(self.read(name).cpu().float(), expected):
            raise ModelError(f"{name} in {self.directory} is missing, or not the table of its format")


def quantise_directory(source: Path, target: Path, *, double: bool) -> None:
    """Write the model of `source` to `target` with the linears of its blocks in NF4, as bitsandbytes stores them.

    Holds one shard at a time. Raises: UnsupportedModelError for a family that is not known natively.
    """
    config = read_config(source)
    files = WeightFiles(source)
    linears = _block_linears(config)
    plan = _plan_shards(files, set(linears), double)
    for index, names in enumerate(plan):
        shard: dict[str, Tensor] = {}
        for name in names:
            tensor = files.read(name)
            if name in linears:
                rows = tensor.t().contiguous() if linears[name] else tensor
                shard |= _state_tensors(name, quantize_nf4(rows, double))
            else:
                shard[name] = tensor.contiguous()
        save_shard(shard, target / shard_name(index, len(plan)))
        if len(plan) > 1:
            _extend_index(target / INDEX, shard, shard_name(index, len(plan)))
    section = _section(double, str(config.raw.get("dtype", "float32")))
    write_json_atomic(target / "config.json", {**config.raw, "quantization_config": section})


def _block_linears(config: ModelConfig) -> dict[str, bool]:
    """Names of the weights to quantise, and whether the file holds them as [in, out]."""
    with torch.device("meta"):
        decoder = Decoder(config)
    return {
        item.name: item.transposed
        for item in tensor_names(decoder)
        if item.part is not None and item.kind == "weight" and "blocks." in item.module and "router" not in item.module
    }


def _plan_shards(files: WeightFiles, linears: set[str], double: bool) -> list[list[str]]:
    plan: list[list[str]] = [[]]
    used = 0
    for name in files.names():
        size = FORMATS["nf4-double" if double else "nf4"] if name in linears else FORMATS["float32"]
        num_bytes = size.bytes_for(torch.Size(files.shape(name)).numel())
        if plan[-1] and used + num_bytes > MAX_SHARD_BYTES:
            plan.append([])
            used = 0
        plan[-1].append(name)
        used += num_bytes
    return plan


def _state_tensors(name: str, weight: NF4Weight) -> dict[str, Tensor]:
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tables = {f"{name}.quant_map": nf4_values(torch.device("cpu")).clone()}
    if weight.scale_scales is not None and weight.offset is not None:
        state |= {"nested_blocksize": SCALE_BLOCK, "nested_dtype": "float32", "nested_offset": weight.offset.item()}
        tables[f"{name}.nested_quant_map"] = dynamic_values(torch.device("cpu")).clone()
        tables[f"{name}.nested_absmax"] = weight.scale_scales
    packed = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    codes = weight.codes.reshape(-1, 1)
    return {name: codes, f"{name}.absmax": weight.scales, **tables, name + _STATE: packed}


def _section(double: bool, dtype: str) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
    }


def _extend_index(path: Path, shard: Mapping[str, Tensor], file: str) -> None:
    index = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"metadata": {}, "weight_map": {}}
    total = index["metadata"].get("total_size", 0) + sum(tensor.nbytes for tensor in shard.values())
    places = {**index["weight_map"], **dict.fromkeys(shard, file)}
    write_json_atomic(path, {"metadata": {"total_size": total}, "weight_map": places})

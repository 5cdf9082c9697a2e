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

from tunesmith.checkpoint.files import WeightFiles
from tunesmith.errors import ModelError, UnsupportedModelError
from tunesmith.kernels.codebooks import dynamic_values, nf4_values
from tunesmith.kernels.nf4 import BLOCK, SCALE_BLOCK, NF4Weight, empty_nf4

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

"""Checkpoints whose linears are held in codes already: AWQ's, GPTQ's, and those of `tunesmith compress`.

Ours, in config.json: quantization_config {"quant_method": "tunesmith", "version": 1, "format": ..., "head": ...}; in
the safetensors, beside tensors that are not quantised, under Hugging Face's names:

NAME.words, NAME.scales, NAME.zeros     int4, see kernels/int4.py (zeros only with zero points)
NAME.codes, NAME.scale                  int8, see kernels/int8.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.arch import ModelConfig, read_config
from tunesmith.checkpoint.awq import check_awq_config, unpack_awq
from tunesmith.checkpoint.files import WeightFiles
from tunesmith.checkpoint.gptq import check_gptq_config, column_order, unpack_gptq, zero_shift
from tunesmith.checkpoint.load import CheckpointWeights
from tunesmith.checkpoint.names import TensorName, tensor_names
from tunesmith.checkpoint.own_part import Boxes
from tunesmith.checkpoint.quantized_load import fill_held
from tunesmith.errors import ModelError, UnsupportedModelError
from tunesmith.kernels.int4 import GROUPS, Int4Weight, pack_words, padded_width
from tunesmith.kernels.int4_layout import BLOCK
from tunesmith.kernels.int8 import Int8Weight
from tunesmith.model.decode_linears import hold_head_in_int8
from tunesmith.model.decoder import Decoder
from tunesmith.model.held import HeldLinear
from tunesmith.model.int4 import Int4Linear
from tunesmith.model.int8 import Int8Linear
from tunesmith.model.layers import Linear

OURS = "tunesmith"
VERSION = 1
METHODS = ("awq", "gptq", OURS)
_MARKS = (".qweight", ".words", ".codes")
_OTHERS = (".qzeros", ".scales", ".g_idx", ".zeros", ".scale")
Held = Int4Weight | Int8Weight


def held_method(config: ModelConfig) -> str | None:
    """Which of `METHODS` a model is quantised by, None for none of them."""
    section = config.raw.get("quantization_config") or {}
    method = section.get("quant_method")
    return method if method in METHODS else None


def load_held(directory: Path, *, device: torch.device | str, dtype: torch.dtype | None = None) -> Decoder:
    """The decoder of a directory that AWQ, GPTQ or `tunesmith compress` quantised, its codes as they are.

    dtype: of what is not quantised, and of the products. None: the checkpoint's.
    Raises: ModelError, UnsupportedModelError for a variant that is not read.
    """
    config = read_config(directory)
    files = HeldFiles(directory, device, config.raw["quantization_config"])
    source = HeldWeights(files, config)
    decoder = fill_held(config, source, dtype or source.dtype, device, source.replace_linears)
    if files.has_head_beside(decoder):
        hold_head_in_int8(decoder)
    return decoder


class HeldFiles(WeightFiles):
    """Tensors of one directory by the names of the weights they stand for: `read_held` for those in codes."""

    def __init__(self, directory: Path, device: torch.device | str, section: Mapping[str, Any]) -> None:
        super().__init__(directory, device)
        self.section = section
        self.method = section["quant_method"]
        _check_section(section, directory)
        names = super().names()
        self._held = {name.rpartition(".")[0]: name for name in names if name.endswith(_MARKS)}

    def names(self) -> list[str]:
        """The names of the weights, without what belongs to their quantisation."""
        plain = [n for n in super().names() if n.rpartition(".")[0] not in self._held or n.endswith(".bias")]
        return sorted([*plain, *(f"{prefix}.weight" for prefix in self._held)])

    def has_head_beside(self, decoder: Decoder) -> bool:
        """Whether the head is to be held in int8 beside an embedding that it is tied to."""
        return self.method == OURS and self.section.get("head") == "int8" and decoder.head is None

    def is_held(self, name: str) -> bool:
        """Whether this weight is in codes."""
        return name.removesuffix(".weight") in self._held and name.endswith(".weight")

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the weight [F, D]; of int4 of ours, whose rows are padded, D is not known here: whole blocks."""
        if not self.is_held(name):
            return super().shape(name)
        prefix = name.removesuffix(".weight")
        rows, columns = super().shape(self._held[prefix])
        if self.method == "awq":
            return columns * 8, rows
        if self.method == "gptq":
            return columns, rows * 8
        return (rows, columns * 8) if self._held[prefix].endswith(".words") else (rows, columns)

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype of a floating-point tensor; of a weight in codes that of its scales."""
        if not self.is_held(name):
            return super().dtype(name)
        return super().dtype(f"{name.removesuffix('.weight')}.scales")

    def read_held(self, name: str, width: int) -> Held:
        """A weight as it is held, `width` columns wide."""
        prefix = name.removesuffix(".weight")
        if self.method == OURS:
            return self._read_ours(prefix, width)
        qweight, qzeros, stored = (self.read(f"{prefix}.{part}") for part in ("qweight", "qzeros", "scales"))
        if self.method == "awq":
            codes, zeros, scales = unpack_awq(qweight, qzeros, stored)
        else:
            codes, zeros, scales = unpack_gptq(qweight, qzeros, stored, zero_shift(self.section))
        order = self.order(name)
        codes = codes if order is None else codes[:, order]
        return _as_int4(codes, zeros, scales, self.group_size(width), order)

    def order(self, name: str) -> Tensor | None:
        """The columns of a weight sorted by group, None where they are in order."""
        key = f"{name.removesuffix('.weight')}.g_idx"
        if self.method != "gptq" or key not in self:
            return None
        g_idx = self.read(key)
        try:
            return column_order(g_idx, self.group_size(g_idx.numel()))
        except ValueError as error:
            raise UnsupportedModelError(f"{key} of {self.directory}: {error}; take quantize='int4'") from None

    def group_size(self, width: int) -> int:
        """Columns of a scale as stored."""
        section = self.section["format"] if self.method == OURS else self.section
        asked = int(section.get("group_size", 128))
        return width if asked == -1 else asked

    def _read_ours(self, prefix: str, width: int) -> Held:
        if f"{prefix}.codes" in self:
            codes = self.read(f"{prefix}.codes")
            return Int8Weight(codes, self.read(f"{prefix}.scale"), torch.float32)
        words, scales = self.read(f"{prefix}.words"), self.read(f"{prefix}.scales")
        zeros = self.read(f"{prefix}.zeros") if f"{prefix}.zeros" in self else None
        return Int4Weight(words, scales, zeros, (words.shape[0], width), torch.float32)


class HeldWeights(CheckpointWeights):
    """The tensors of such a directory, by our names."""

    files: HeldFiles

    def read(self, item: TensorName) -> Any:
        """The tensor as [out, in]; one in codes as it is held."""
        name = self._stored[item.name]
        return self.files.read_held(name, item.shape[1]) if self.files.is_held(name) else super().read(item)

    def replace_linears(self, decoder: Decoder) -> None:
        """Put linears that hold codes where the checkpoint has them. Raises: UnsupportedModelError."""
        wanted = [i for i in tensor_names(decoder) if i.part is not None and i.kind == "weight"]
        for path, group in groupby(wanted, key=lambda item: item.module):
            names = [self._stored[item.name] for item in group]
            held = [name for name in names if self.files.is_held(name)]
            if not held:
                continue
            if len(held) < len(names):
                raise UnsupportedModelError(
                    f"{self.files.directory} quantises {held[0]}, not all that share its input ({', '.join(names)}): "
                    f"take the unquantised model and quantize='int4'"
                )
            parent, _, name = path.rpartition(".")
            setattr(decoder.get_submodule(parent), name, self._linear(decoder.get_submodule(path), names))

    def _linear(self, linear: nn.Module, names: Sequence[str]) -> HeldLinear:
        assert isinstance(linear, Linear)
        common: dict[str, Any] = {"dtype": linear.weight.dtype, "device": "meta"}
        has_bias = linear.bias is not None
        if f"{names[0].removesuffix('.weight')}.codes" in self.files:
            products = self.files.section["format"]["kind"] == "w8a8" and "lm_head" not in linear.parts
            return Int8Linear(linear.in_features, linear.parts, has_bias, has_int8_products=products, **common)
        orders = [self.files.order(name) for name in names]
        self._check_orders(orders, names)
        return Int4Linear(
            linear.in_features,
            linear.parts,
            has_bias,
            group_size=_held_group(self.files.group_size(linear.in_features)),
            symmetric=self.files.method == OURS and bool(self.files.section["format"]["symmetric"]),
            scale_dtype=self.files.dtype(names[0]) or torch.float16,
            ordered=orders[0] is not None,
            **common,
        )

    def _check_orders(self, orders: list[Tensor | None], names: Sequence[str]) -> None:
        first = orders[0]
        for order in orders[1:]:
            if (order is None) != (first is None) or (order is not None and not torch.equal(order, first)):  # type: ignore[arg-type]
                raise UnsupportedModelError(
                    f"{', '.join(names)} of {self.files.directory} share an input but sort its columns differently "
                    f"(g_idx): take a checkpoint without desc_act, or the unquantised model and quantize='int4'"
                )

    def _shape(self, item: TensorName) -> tuple[int, ...]:
        shape = super()._shape(item)
        is_padded = self.files.method == OURS and shape != item.shape and self.files.is_held(self._stored[item.name])
        return (shape[0], item.shape[1]) if is_padded and shape[1] == padded_width(item.shape[1]) else shape

    def reading_ahead(self, wanted: Sequence[TensorName], boxes: Boxes | None = None) -> AbstractContextManager[None]:
        """As above, of what is not in codes."""
        return super().reading_ahead([item for item in wanted if self.reads_boxes(item)], boxes)

    def reads_boxes(self, item: TensorName) -> bool:
        """Codes are read whole."""
        return not self.files.is_held(self._stored[item.name])


def _check_section(section: Mapping[str, Any], directory: Path) -> None:
    method = section["quant_method"]
    if method == OURS:
        if int(section.get("version", 0)) != VERSION:
            raise ModelError(
                f"{directory} was compressed in version {section.get('version')!r} of the format, this tunesmith reads "
                f"{VERSION}: compress it again with tunesmith compress"
            )
        return
    (check_awq_config if method == "awq" else check_gptq_config)(section, directory)
    group = int(section.get("group_size", 128))
    if group != -1 and group not in GROUPS and group % BLOCK:
        raise UnsupportedModelError(
            f"{directory} has groups of {group} columns; read are {', '.join(map(str, GROUPS))}, multiples of {BLOCK}, "
            f"and -1 (whole rows): take the unquantised model and quantize='int4'"
        )


def _held_group(group_size: int) -> int:
    """Columns of a scale as held: of larger groups the scale is repeated."""
    return group_size if group_size in GROUPS else BLOCK


def _as_int4(codes: Tensor, zeros: Tensor, scales: Tensor, group_size: int, order: Tensor | None) -> Int4Weight:
    rows, width = codes.shape
    held = _held_group(group_size)
    if group_size != held:
        repeats = -(-group_size // held)
        scales, zeros = scales.repeat_interleave(repeats, 1), zeros.repeat_interleave(repeats, 1)
    missing = padded_width(width) // held - scales.shape[1]
    scales, zeros = F.pad(scales, (0, missing)), F.pad(zeros, (0, missing))
    words = pack_words(codes)
    return Int4Weight(words, scales.contiguous(), zeros.contiguous(), (rows, width), scales.dtype, order)

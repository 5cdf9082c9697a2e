"""The weight formats of inference by name, and linears in them put in place of linears."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from tunesmith.errors import ModelError, nearest
from tunesmith.kernels.int4 import GROUPS
from tunesmith.model.held import HeldLinear
from tunesmith.model.int4 import Int4Linear
from tunesmith.model.int8 import Int8Linear
from tunesmith.model.layers import Linear

Kind = Literal["int8", "w8a8", "int4"]


@dataclass(frozen=True)
class WeightFormat:
    """How the linears of the blocks are held: int8, int8 with int8 products (w8a8), or int4 by groups."""

    kind: Kind
    group_size: int = 128
    symmetric: bool = False

    @property
    def name(self) -> str:
        """As `parse_format` reads it."""
        if self.kind != "int4":
            return self.kind
        return f"int4-g{self.group_size}" + ("-sym" if self.symmetric else "")

    def to_json(self) -> dict[str, Any]:
        """The fields, for a file."""
        return asdict(self)


_NAMES = {"int8": WeightFormat("int8"), "w8a8": WeightFormat("w8a8"), "int4": WeightFormat("int4")}
_NAMES |= {f"int4{tail}": WeightFormat("int4", symmetric=tail != "") for tail in ("", "-sym")}
for _group in GROUPS:
    for _symmetric in (False, True):
        _format = WeightFormat("int4", _group, _symmetric)
        _NAMES[_format.name] = _format
FORMAT_NAMES = tuple(_NAMES)
"""int8, w8a8, int4 (groups of 128 with zero points), int4-sym, and int4-gN, int4-gN-sym for groups of N."""


def parse_format(name: str) -> WeightFormat | None:
    """The format of this name; None for those of training (nf4, fp8 and their variants)."""
    return _NAMES.get(name)


def check_format(name: str, also: tuple[str, ...] = ()) -> WeightFormat:
    """The format of this name. Raises: ModelError naming the nearest and all."""
    found = parse_format(name)
    if found is None:
        known = [*FORMAT_NAMES, *also]
        raise ModelError(f"there is no weight format {name!r}{nearest(name, known)}; there are: {', '.join(known)}")
    return found


def held_linear(linear: Linear, held: WeightFormat) -> HeldLinear:
    """An empty linear in this format, of the same parts, dtype and device (meta too)."""
    weight = linear.weight
    common: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
    has_bias = linear.bias is not None
    if held.kind == "int4":
        out: HeldLinear = Int4Linear(
            linear.in_features,
            linear.parts,
            has_bias,
            group_size=held.group_size,
            symmetric=held.symmetric,
            **common,
        )
    else:
        out = Int8Linear(linear.in_features, linear.parts, has_bias, has_int8_products=held.kind == "w8a8", **common)
    return out.requires_grad_(False)


def hold_linears(model: nn.Module, held: WeightFormat) -> int:
    """Put linears in this format in place of those of the blocks (not head, nor routers); returns how many.

    On the meta device too; what has storage is quantised where it is, one linear at a time.
    """
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Linear and name not in ("head", "router"):
                setattr(parent, name, hold_linear(child, held))
                count += 1
    return count


@torch.no_grad()
def hold_linear(linear: Linear, held: WeightFormat) -> HeldLinear:
    """A linear in this format, quantised where it is; empty where it is on the meta device."""
    out = held_linear(linear, held)
    if not linear.weight.is_meta:
        for part in linear.parts:
            bias = None if linear.bias is None else linear.bias[linear.rows(part)]
            out.load_part(part, linear.part_weight(part), bias)
    return out

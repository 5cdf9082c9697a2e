"""Of weights that processes share, each reads its own: which parts of which tensors, and how they are put in."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from tunesmith.checkpoint.names import TensorName
from tunesmith.parallel.own_boxes import Rectangle, load_boxes, own_boxes
from tunesmith.parallel.shard_linears import is_cut

Boxes = Mapping[str, Sequence[Rectangle]]
"""By Hugging Face's names, what is read of [out, in], in order."""


class ReadsBoxes(Protocol):
    """Where tensors come from."""

    def reads_boxes(self, item: TensorName) -> bool:
        """Whether a part of this tensor can be read without the rest."""

    def read_box(self, item: TensorName, box: Rectangle) -> Tensor:
        """Some rows and columns of [out, in]."""

    def read(self, item: TensorName) -> Any:
        """The whole tensor."""


def boxes_of_own(
    decoder: nn.Module, source: ReadsBoxes, wanted: Sequence[TensorName], doubles: Collection[str] = ()
) -> Boxes:
    """The weights of which this process reads a part, and which: of linears that are cut (`doubles`: paths of those
    whose whole has NF4 with quantised scales)."""
    found = {}
    for item in wanted:
        module = decoder.get_submodule(item.module) if item.part is not None and item.kind == "weight" else None
        if item.part is not None and module is not None and is_cut(module) and source.reads_boxes(item):
            found[item.name] = own_boxes(module, item.part, item.module in doubles)
    return found


def load_own(module: nn.Module, source: ReadsBoxes, items: Sequence[TensorName], double: bool = False) -> None:
    """Fill one projection's part of a linear that is cut; items: its weight, and its bias if it has one."""
    named = {item.kind: item for item in items}
    weight, part = named["weight"], named["weight"].part
    assert part is not None
    bias_F = source.read(named["bias"]) if "bias" in named else None
    load_boxes(module, part, lambda box: source.read_box(weight, box), bias_F, double)

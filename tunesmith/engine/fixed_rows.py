"""Linears whose result for a row does not depend on how many rows there are: every product has the same shape.

    x_TD, padded to whole groups of `rows`  ->  one product for each group  ->  the first T rows

A matrix product is free to choose its order of summation by the shape, and does. With one shape there is one order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.model.moe import Experts
from tunesmith.model.multi_lora import MultiLoraLinear


def in_groups(run: Callable[[Tensor], Tensor], x_TD: Tensor, rows: int) -> Tensor:
    """`run` of x, `rows` rows at a time, the last ones beside rows of zeros."""
    num = x_TD.shape[0]
    groups = F.pad(x_TD, (0, 0, 0, -num % rows)).split(rows)
    return run(groups[0])[:num] if len(groups) == 1 else torch.cat([run(group) for group in groups])[:num]


class FixedRows(nn.Module):
    """A linear, of any form, that computes `rows` rows at a time."""

    def __init__(self, inner: nn.Module, rows: int) -> None:
        super().__init__()
        known = cast(Any, inner)
        self.in_features: int = known.in_features
        self.parts = dict(known.parts)
        self.inner = inner
        self.rows = rows

    def forward(self, x_TD: Tensor) -> Tensor:
        return in_groups(self.inner, x_TD, self.rows)


def fix_rows(module: nn.Module, rows: int) -> int:
    """Put FixedRows in place of every linear in a module, where there are adapters under them; how many there were."""
    found = 0
    for name, child in list(module.named_children()):
        if isinstance(child, FixedRows):
            continue
        if isinstance(child, MultiLoraLinear):
            if not isinstance(child.base, FixedRows):
                child.base = FixedRows(child.base, rows)
                found += 1
        elif hasattr(child, "in_features") and hasattr(child, "parts"):
            setattr(module, name, FixedRows(child, rows))
            found += 1
        else:
            found += fix_rows(child, rows)
    return found


def fix_experts(module: nn.Module, rows: int) -> int:
    """`fix_rows` of the experts alone, which get as many rows as the router sends them, in a pass of any size."""
    mixtures = [child for child in module.modules() if isinstance(child, Experts)]
    return sum(fix_rows(mixture.experts, rows) for mixture in mixtures)

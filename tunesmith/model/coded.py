"""Codes that travel with the tensor they were made from, from the kernel that makes both to the fp8 product that reads.

    y, codes, scale = kernel(...)        hand_over(y, (codes, scale))
    ...                                  row_codes(y)          the same codes, or those of quantising y now

Between the two stand adapters, dropout, norms of weights: none of them has to know. Codes are handed over once, so that
they live no longer than those that a product makes for itself, and only while the tensor is what it was: written to
since, or asked for with another factor folded in, it is quantised anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from tunesmith.kernels.fp8 import Codes, quantize_rows_fp8

_NAME = "_tunesmith_codes"


@dataclass
class _Handed:
    codes: Codes
    fold_D: Tensor | None
    version: int


def hand_over(x_TD: Tensor, codes: Codes, fold_D: Tensor | None = None) -> None:
    """Leave the codes of x, its columns multiplied by `fold_D` before, for the product that x goes to."""
    setattr(x_TD, _NAME, _Handed(codes, fold_D, x_TD._version))


def row_codes(x_TD: Tensor, fold_D: Tensor | None = None) -> Codes:
    """What `quantize_rows_fp8` gives: handed over with x, and then for this call only, or made now."""
    handed = cast("_Handed | None", cast(Any, x_TD).__dict__.pop(_NAME, None))
    if handed is not None and handed.fold_D is fold_D and handed.version == x_TD._version:
        return handed.codes
    return quantize_rows_fp8(x_TD, fold_D)

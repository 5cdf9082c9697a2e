"""Which written-out form a linear of a block has."""

from __future__ import annotations

import torch
from torch import nn

from tunesmith.model.dora_projection import DoraProjection
from tunesmith.model.fp8 import Fp8Linear
from tunesmith.model.layers import Linear
from tunesmith.model.lora import AdaptedLinear
from tunesmith.model.low_rank import LowRank
from tunesmith.model.projection import Projection
from tunesmith.model.quant import NF4Linear
from tunesmith.model.row_scale import RowScale


def projection_of(linear: nn.Module, dtype: torch.dtype, site: int = 0) -> Projection | None:
    """The written-out form of a linear; None where its passes are autograd's.

    That is a foreign linear, dropout on a CPU, and dropout with DoRA, whose base then sees two inputs.
    Args: site: tells the masks of the linears of one model apart.
    """
    if isinstance(linear, Linear | NF4Linear | Fp8Linear):
        return Projection(linear)
    if not isinstance(linear, AdaptedLinear) or not isinstance(linear.base, Linear | NF4Linear | Fp8Linear):
        return None
    low_rank = LowRank(linear, dtype)
    if linear.dropout and (linear.is_dora or not writes_dropout(low_rank.down_RD.device)):
        return None
    if linear.is_dora:
        return DoraProjection(linear.base, low_rank, rows=RowScale(linear, dtype))
    return Projection(linear.base, low_rank, linear.dropout, site)


def writes_dropout(device: torch.device) -> bool:
    """Whether masks are drawn by our generator there: on a CPU they stay those of torch's, in torch's order."""
    return device.type == "cuda"

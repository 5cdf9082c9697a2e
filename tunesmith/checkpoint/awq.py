"""Linears that AWQ quantised to 4 bits ("gemm" layout), as int4 weights of ours: the same values.

NAME.qweight    int32 [D, F / 8]        nibble i of word c: output row 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]
NAME.qzeros     int32 [D / G, F / 8]    zero points, packed alike
NAME.scales     float16 [D / G, F]      w[f, k] = (code - zero) * scale
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import UnsupportedModelError

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def check_awq_config(section: Mapping[str, Any], directory: Path) -> None:
    """Refuse what is not 4 bits with zero points in the "gemm" layout. Raises: UnsupportedModelError."""
    bits, version = section.get("bits", section.get("w_bit", 4)), str(section.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm" or not section.get("zero_point", True):
        raise UnsupportedModelError(
            f"{directory} is AWQ with bits={bits}, version={version!r}, zero_point={section.get('zero_point', True)}; "
            f"read is 4 bits, version 'gemm', with zero points: take the unquantised model and quantize='int4'"
        )


def unpack_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [F, D], zero points uint8 [F, D / G] and scales [F, D / G]."""
    return _unpack(qweight).t(), _unpack(qzeros).t(), scales.t()


def _unpack(words: Tensor) -> Tensor:
    """uint8 [rows, 8 x words]."""
    out = torch.empty(words.shape[0], words.shape[1], 8, dtype=torch.uint8, device=words.device)
    for position, column in enumerate(_ORDER):
        out[:, :, column] = (words >> (4 * position)).bitwise_and_(15)
    return out.view(words.shape[0], -1)

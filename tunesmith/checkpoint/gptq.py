"""Linears that GPTQ quantised to 4 bits, as int4 weights of ours: the same values.

NAME.qweight    int32 [D / 8, F]        nibble i of word r: input column 8 r + i
NAME.qzeros     int32 [D / G, F / 8]    nibble i of word c: zero point of output row 8 c + i, less one
                                        (as it is where checkpoint_format is "gptq_v2")
NAME.scales     float16 [D / G, F]      w[f, k] = (code - zero) * scale, zero and scale of group g_idx[k]
NAME.g_idx      int32 [D]               k // G, or sorted by activation size (desc_act): any order
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import UnsupportedModelError


def check_gptq_config(section: Mapping[str, Any], directory: Path) -> None:
    """Refuse what is not 4 bits in GPTQ's layout. Raises: UnsupportedModelError."""
    bits, layout = section.get("bits", 4), section.get("checkpoint_format", "gptq")
    if bits != 4 or layout not in ("gptq", "gptq_v2"):
        hint = "int8" if bits == 8 else "int4"
        raise UnsupportedModelError(
            f"{directory} is GPTQ with bits={bits}, checkpoint_format={layout!r}; read are 4 bits in 'gptq' and "
            f"'gptq_v2': take the unquantised model and quantize='{hint}'"
        )


def zero_shift(section: Mapping[str, Any]) -> int:
    """What was taken off the zero points when they were stored."""
    return 0 if section.get("checkpoint_format", "gptq") == "gptq_v2" else 1


def unpack_gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [F, D], zero points uint8 [F, D / G] and scales [F, D / G]."""
    return _unpack(qweight.t()), _unpack(qzeros).add_(shift).t(), scales.t()


def column_order(g_idx: Tensor, group_size: int) -> Tensor | None:
    """The columns sorted by their group, int64 [D]; None where they are in order already.

    Raises: ValueError where groups are not of `group_size` columns each.
    """
    groups = g_idx.long()
    expected = torch.arange(groups.numel(), device=groups.device) // group_size
    if torch.equal(groups, expected):
        return None
    order = torch.argsort(groups, stable=True)
    if not torch.equal(groups[order], expected):
        raise ValueError(f"g_idx does not hold groups of {group_size} columns")
    return order


def _unpack(words: Tensor) -> Tensor:
    """uint8 [rows, 8 x words], nibbles in order."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    return ((words[:, :, None] >> shifts) & 15).to(torch.uint8).reshape(words.shape[0], -1)

"""NF4 weights straight into fp8 codes with a scale for each output row, just before a product in fp8.

    fp8 code = round(value[nf4 code] * block scale / row scale)     row scale = the row's largest block scale / 448

The largest magnitude of a block's values is its scale, so a pass over the scales bounds the row, and none over the
values is needed. The weight is not rounded to its own dtype in between, as `dequantize_nf4` does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.kernels.fp8 import Fp8Weight, row_scale, to_codes, use_fp8_kernel
from tunesmith.kernels.nf4 import BLOCK, NF4Weight, dequantize_reference, plain_scales


def nf4_to_fp8(
    weights: NF4Weight | Sequence[NF4Weight], transposed: bool = False, scale_F: Tensor | None = None
) -> Fp8Weight:
    """The fp8 form of NF4 weights of one width, their rows below each other; codes [F, D], or [D, F] `transposed`.

    Args: scale_F: what `nf4_row_scales` gave for them, where it is at hand already.
    """
    parts = [weights] if isinstance(weights, NF4Weight) else list(weights)
    scale_F = nf4_row_scales(parts) if scale_F is None else scale_F
    shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
    codes = _codes(parts, scale_F, transposed)
    return Fp8Weight(codes, scale_F, shape, parts[0].dtype)


def nf4_row_scales(weights: NF4Weight | Sequence[NF4Weight]) -> Tensor:
    """The fp8 scale of every output row, float32 [F]."""
    parts = [weights] if isinstance(weights, NF4Weight) else list(weights)
    return torch.cat([_part_row_scales(part) for part in parts])


def nf4_to_fp8_reference(parts: Sequence[NF4Weight], scale_F: Tensor, transposed: bool) -> Tensor:
    """The codes by plain torch: the truth that the kernel must equal."""
    rows = [part.shape[0] for part in parts]
    codes = [
        to_codes(_exact_values(part), scale[:, None]) for part, scale in zip(parts, scale_F.split(rows), strict=True)
    ]
    whole = torch.cat([code.view(torch.uint8) for code in codes])
    return (whole.t().contiguous() if transposed else whole).view(codes[0].dtype)


def _codes(parts: Sequence[NF4Weight], scale_F: Tensor, transposed: bool) -> Tensor:
    """By the kernel where it can be: it takes rows of whole blocks."""
    first = parts[0].codes
    if not use_fp8_kernel(first.device) or parts[0].shape[1] % BLOCK:
        return nf4_to_fp8_reference(parts, scale_F, transposed)
    from tunesmith.kernels.nf4_fp8_triton import nf4_to_fp8_codes

    return nf4_to_fp8_codes(parts, scale_F, transposed)


def _exact_values(weight: NF4Weight) -> Tensor:
    """value[code] * scale in float32, not rounded to the weight's own dtype."""
    return dequantize_reference(
        NF4Weight(weight.codes, weight.scales, weight.shape, torch.float32, weight.scale_scales, weight.offset)
    )


def _part_row_scales(weight: NF4Weight) -> Tensor:
    """Of every row the largest scale of the blocks it reaches into, which it may share with its neighbours."""
    num_rows, width = weight.shape
    scales = plain_scales(weight).abs()
    if width % BLOCK == 0:
        return row_scale(scales.view(num_rows, -1).amax(dim=1))
    start = torch.arange(num_rows, device=scales.device) * width
    first, last = start // BLOCK, (start + width - 1) // BLOCK
    index = first[:, None] + torch.arange(int((last - first).max()) + 1, device=scales.device)
    return row_scale(scales[torch.minimum(index, last[:, None])].amax(dim=1))

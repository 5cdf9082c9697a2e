"""Products of few tokens as torch custom operators, one for each format. Imported only where Triton is installed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.kernels.codebooks import dynamic_values, nf4_values
from tunesmith.kernels.gemv_dot_triton import dot
from tunesmith.kernels.gemv_quads_triton import quads, takes_quads
from tunesmith.kernels.gemv_triton import gemv
from tunesmith.kernels.int4_layout import BLOCK

_FLOAT, _INT8, _FP8, _INT4, _NF4 = range(5)


def _run(
    format_id: int,
    x_TD: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bias_F: Tensor | None,
    per_block: int = 1,
) -> Tensor:
    """A product by whichever kernel has it."""
    x = x_TD.contiguous()
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    is_done = False
    if takes_quads(format_id, x) and (scales is not None or weight.dtype == x.dtype):
        is_done = quads(format_id, x, weight, scales, zeros, bias_F, out, per_block=per_block)
    if is_done:
        return out
    if x.shape[0] == 1:
        has_zeros = zeros is not None
        gemv(format_id, x[0], weight, scales, zeros, bias_F, out[0], per_block=per_block, has_zeros=has_zeros)
    elif x.shape[0]:
        dot(format_id, x, weight, scales, zeros, bias_F, out, per_block=per_block)
    return out


def _like(x_TD: Tensor, rows: int) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0], rows)


@torch.library.custom_op("tunesmith::linear_few", mutates_args=())
def float_operator(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, D] @ weight [F, D].T + bias, the weight contiguous in a floating-point dtype."""
    return _run(_FLOAT, x, weight, None, None, bias)


@float_operator.register_fake
def _float_fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _like(x, weight.shape[0])


@torch.library.custom_op("tunesmith::swiglu_few", mutates_args=())
def swiglu_few_operator(
    format_id: int, x: Tensor, weight: Tensor, scales: Tensor | None, zeros: Tensor | None, bias: Tensor | None
) -> Tensor:
    """silu(gate) * up [T, F / 2] of gate and up = x @ weight.T + bias, in one launch, of what `takes_quads`.

    Rounded as product and swiglu apart are. Where this version of Triton can't, by both.
    """
    x, held = x.contiguous(), weight.view(torch.int8) if format_id == _FP8 else weight
    per_block = 1 if format_id != _INT4 or scales is None else scales.shape[1] * BLOCK // (weight.shape[1] * 8)
    h = torch.empty(x.shape[0], weight.shape[0] // 2, dtype=x.dtype, device=x.device)
    if quads(format_id, x, held, scales, zeros, bias, h, per_block=per_block, is_gated=True):
        return h
    from tunesmith.kernels.swiglu import swiglu

    return swiglu(_run(format_id, x, held, scales, zeros, bias, per_block))


@swiglu_few_operator.register_fake
def _swiglu_few_fake(
    format_id: int, x: Tensor, weight: Tensor, scales: Tensor | None, zeros: Tensor | None, bias: Tensor | None
) -> Tensor:
    return _like(x, weight.shape[0] // 2)


@torch.library.custom_op("tunesmith::int8_linear_few", mutates_args=())
def int8_operator(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, D] @ (codes int8 [F, D] * scale float32 [F]).T + bias."""
    return _run(_INT8, x, codes, scale, None, bias)


@int8_operator.register_fake
def _int8_fake(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return _like(x, codes.shape[0])


@torch.library.custom_op("tunesmith::fp8_linear_few", mutates_args=())
def fp8_operator(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, D] @ (codes e4m3 [F, D] * scale float32 [F]).T + bias; the input is not quantised."""
    return _run(_FP8, x, codes.view(torch.int8), scale, None, bias)


@fp8_operator.register_fake
def _fp8_fake(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return _like(x, codes.shape[0])


@torch.library.custom_op("tunesmith::int4_linear_few", mutates_args=())
def int4_operator(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """x [T, D] @ weight.T + bias, the weight in int4 by groups, see kernels/int4.py."""
    return _run(_INT4, x, words, scales, zeros, bias, scales.shape[1] * BLOCK // (words.shape[1] * 8))


@int4_operator.register_fake
def _int4_fake(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    return _like(x, words.shape[0])


@torch.library.custom_op("tunesmith::nf4_linear_one", mutates_args=())
def nf4_operator(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    scale_scales: Sequence[Tensor],
    offsets: Sequence[Tensor],
    bias: Tensor | None = None,
) -> Tensor:
    """x [1, D] @ weight.T + bias, the weight's parts in NF4 below each other. Empty `scale_scales`: plain scales."""
    rows = [part.shape[0] for part in codes]
    out = torch.empty(1, sum(rows), dtype=x.dtype, device=x.device)
    tables = nf4_values(x.device), dynamic_values(x.device)
    biases = [None] * len(rows) if bias is None else bias.split(rows)
    row = x.contiguous()[0]
    for part, part_out in enumerate(out[0].split(rows)):
        nf4 = (scale_scales[part], offsets[part], *tables)
        words, double = codes[part].view(torch.int32), scale_scales[part].numel() > 0
        gemv(_NF4, row, words, scales[part], None, biases[part], part_out, has_zeros=double, nf4=nf4)
    return out


@nf4_operator.register_fake
def _nf4_fake(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    scale_scales: Sequence[Tensor],
    offsets: Sequence[Tensor],
    bias: Tensor | None = None,
) -> Tensor:
    return _like(x, sum(part.shape[0] for part in codes))

"""Triton kernels that dequantise int4 and int8 weights, as torch custom operators: what many tokens' products are with.

Each weight is read once and written once. Imported only where Triton is installed.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.int4_layout import BLOCK
from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current
from tunesmith.units import ceil_div

# Words, or bytes, of one row that a program takes.
WORDS_AT_ONCE = 256
BYTES_AT_ONCE = 2048


@torch.library.custom_op("tunesmith::int4_dequantize", mutates_args=())
def int4_dequantize_operator(
    words: Tensor, scales: Tensor, zeros: Tensor | None, width: int, dtype: torch.dtype
) -> Tensor:
    """(code - zero) * scale [F, width] in `dtype`, see kernels/int4.py."""
    out = torch.empty(words.shape[0], width, dtype=dtype, device=words.device)
    grid = (words.shape[0], ceil_div(words.shape[1], WORDS_AT_ONCE))
    if out.numel():
        with current(out.device):
            int4_dequantize_kernel[grid](
                words,
                scales,
                scales if zeros is None else zeros,
                out,
                words.shape[1],
                width,
                PER_BLOCK=scales.shape[1] * BLOCK // (words.shape[1] * 8),
                ZEROS=zeros is not None,
                WORDS=WORDS_AT_ONCE,
                num_warps=2,
                enable_fp_fusion=False,
            )
    return out


@int4_dequantize_operator.register_fake
def _int4_fake(words: Tensor, scales: Tensor, zeros: Tensor | None, width: int, dtype: torch.dtype) -> Tensor:
    return words.new_empty(words.shape[0], width, dtype=dtype)


@torch.library.custom_op("tunesmith::int8_dequantize", mutates_args=())
def int8_dequantize_operator(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes [F, D] * scale [F] in `dtype`; codes int8."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    grid = (codes.shape[0], ceil_div(codes.shape[1], BYTES_AT_ONCE))
    if out.numel():
        with current(out.device):
            int8_dequantize_kernel[grid](
                codes, scale, out, codes.shape[1], COLUMNS=BYTES_AT_ONCE, num_warps=4, enable_fp_fusion=False
            )
    return out


@int8_dequantize_operator.register_fake
def _int8_fake(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


@jit
def int4_dequantize_kernel(
    words,
    scales,
    zeros,
    out,
    num_words,
    width,
    PER_BLOCK: tl.constexpr,
    ZEROS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """A piece of a row: eight planes of runs of 16 columns."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = word < num_words
    packed = tl.load(words + row * num_words + word, mask=inside, other=0)
    group = row * (num_words // 16 * PER_BLOCK) + word // 16 * PER_BLOCK
    for part in tl.static_range(PER_BLOCK):
        scale = tl.load(scales + group + part, mask=inside, other=0.0).to(tl.float32)
        zero = tl.full([WORDS], 8.0, tl.float32)
        if ZEROS:
            zero = tl.load(zeros + group + part, mask=inside, other=0).to(tl.float32)
        for plane in tl.static_range(part * 8 // PER_BLOCK, (part + 1) * 8 // PER_BLOCK):
            column = word // 16 * 128 + plane * 16 + word % 16
            value = (((packed >> (4 * plane)) & 15).to(tl.float32) - zero) * scale
            tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside & (column < width))


@jit
def int8_dequantize_kernel(codes, scale, out, width, COLUMNS: tl.constexpr):
    """A piece of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    value = tl.load(codes + row * width + column, mask=inside, other=0).to(tl.float32) * tl.load(scale + row)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)

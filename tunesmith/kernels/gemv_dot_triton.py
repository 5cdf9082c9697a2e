"""The Triton kernel of products of a few tokens (2 to 64) with a weight in any format, through the tensor cores.

A tile of the weight is widened to the input's 16-bit dtype in registers and multiplied as the left side of the product,
so that its many rows fill the tensor cores' long side and the few tokens their short one. Sums are in float32, in one
order. Weights bound the time, as for one token. Imported only where Triton is installed.
"""

# Triton's decorator and its kernels' arguments have no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tunesmith.kernels.gemv_triton import FLOAT, FP8, INT4
from tunesmith.kernels.launch import current
from tunesmith.units import ceil_div

# Output rows of a program, columns (int4: words) of a step, warps, stages.
SHAPES = {0: (64, 128, 4, 5), 1: (64, 128, 4, 5), 2: (64, 128, 4, 5), 3: (64, 32, 4, 4)}


@triton.jit
def _tokens(x, token, column, num_tokens, WIDTH: tl.constexpr):
    # [columns, tokens] of the input; 0 outside
    inside = (column[:, None] < WIDTH) & (token[None, :] < num_tokens)
    return tl.load(x + token[None, :] * WIDTH + column[:, None], mask=inside, other=0.0)


@triton.jit
def dot_kernel(
    x,
    w,
    scales,
    zeros,
    bias,
    out,
    num_rows,
    num_tokens,
    WIDTH: tl.constexpr,
    FORMAT: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """out[t, f] = sum of x[t, k] w[f, k] (+ bias[f]). What lies outside is read from inside and multiplied by 0."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    held = tl.minimum(row, num_rows - 1).to(tl.int64)
    token = tl.arange(0, TOKENS)
    lane = tl.arange(0, STEP)
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    if FORMAT == INT4:
        NUM_BLOCKS: tl.constexpr = (WIDTH + 127) // 128
        for start in range(0, NUM_BLOCKS * 16, STEP):
            word = start + lane
            inside = tl.minimum(word, NUM_BLOCKS * 16 - 1)
            words = tl.load(w + held[:, None] * (NUM_BLOCKS * 16) + inside[None, :])
            group = held[:, None] * (NUM_BLOCKS * PER_BLOCK) + (inside // 16 * PER_BLOCK)[None, :]
            for part in tl.static_range(PER_BLOCK):
                scale = tl.load(scales + group + part).to(tl.float32)
                zero = tl.full([ROWS, STEP], 8.0, tl.float32)
                if ZEROS:
                    zero = tl.load(zeros + group + part).to(tl.float32)
                for plane in tl.static_range(part * 8 // PER_BLOCK, (part + 1) * 8 // PER_BLOCK):
                    column = word // 16 * 128 + plane * 16 + word % 16
                    code = ((words >> (4 * plane)) & 15 | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
                    weight = ((code - zero) * scale).to(x.dtype.element_ty)
                    acc = tl.dot(weight, _tokens(x, token, column, num_tokens, WIDTH), acc)
    else:
        for start in range(0, WIDTH, STEP):
            column = start + lane
            inside = tl.minimum(column, WIDTH - 1)
            codes = tl.load(w + held[:, None] * WIDTH + inside[None, :])
            if FORMAT == FP8:
                # Sign, exponent and mantissa where bfloat16 has them, the exponent 120 too small.
                bits = ((codes.to(tl.int16) << 8) >> 4) & -30736  # 0x87F0
                weight = (bits.to(tl.bfloat16, bitcast=True).to(tl.float32) * 2.0**120).to(x.dtype.element_ty)
            else:
                weight = codes.to(x.dtype.element_ty)
            acc = tl.dot(weight, _tokens(x, token, column, num_tokens, WIDTH), acc)
        if FORMAT != FLOAT:
            acc *= tl.load(scales + held)[:, None]
    if BIAS:
        acc += tl.load(bias + held).to(tl.float32)[:, None]
    at = token[None, :] * num_rows + row[:, None]
    mask = (row < num_rows)[:, None] & (token < num_tokens)[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


def dot(
    format_id: int,
    x_TD: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bias_F: Tensor | None,
    out_TF: Tensor,
    *,
    per_block: int = 1,
    shape: tuple[int, int, int, int] | None = None,
) -> None:
    """Launch the kernel: several tokens' product into `out_TF`.

    shape: rows, columns (or words) of a step, warps and stages (None: those of `SHAPES`).
    """
    rows, step, warps, stages = shape or SHAPES[format_id]
    num_tokens, num_rows = out_TF.shape
    with current(x_TD.device):
        dot_kernel[(ceil_div(num_rows, rows),)](
            x_TD,
            weight,
            out_TF if scales is None else scales,
            out_TF if zeros is None else zeros,
            out_TF if bias_F is None else bias_F,
            out_TF,
            num_rows,
            num_tokens,
            WIDTH=x_TD.shape[1],
            FORMAT=format_id,
            PER_BLOCK=per_block,
            ZEROS=zeros is not None,
            BIAS=bias_F is not None,
            ROWS=rows,
            STEP=step,
            TOKENS=max(16, triton.next_power_of_2(num_tokens)),
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )

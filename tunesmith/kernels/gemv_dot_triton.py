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
from tunesmith.kernels.jit import jit
from tunesmith.kernels.launch import current
from tunesmith.kernels.quick import quick
from tunesmith.units import ceil_div

# Output rows of a program, columns (int4: words) of a step, warps, stages.
SHAPES = {0: (64, 128, 4, 5), 1: (64, 128, 4, 5), 2: (64, 128, 4, 5), 3: (64, 32, 4, 4)}


def _assembly(plane: int, magic: str) -> str:
    """PTX for two words at a time: their halves side by side, the nibbles shifted to the end, an exponent before them.

    lop3 0xea is (a & b) | c.
    """
    halves = "0x5410" if plane < 4 else "0x7632"
    return (
        f"{{ .reg .b32 t; prmt.b32 t, $1, $2, {halves}; shr.u32 t, t, {plane % 4 * 4}; "
        f"lop3.b32 $0, t, 0x000f000f, {magic}, 0xea; }}"
    )


ASSEMBLY = tl.constexpr([_assembly(plane, magic) for magic in ("0x43004300", "0x64006400") for plane in range(8)])


@jit
def _tokens(x, token, column, num_tokens, width):
    # [columns, tokens] of the input; 0 outside
    inside = (column[:, None] < width) & (token[None, :] < num_tokens)
    return tl.load(x + token[None, :] * width + column[:, None], mask=inside, other=0.0)


@jit
def _plane(words, PLANE: tl.constexpr, HALF: tl.constexpr, BY_HAND: tl.constexpr):
    """Codes of one plane added to 128 (bfloat16) or 1024 (HALF: float16), whose last mantissa bits they are."""
    if BY_HAND:
        return tl.inline_asm_elementwise(
            ASSEMBLY[PLANE + 8 * HALF],
            "=r,r,r",
            [words],
            dtype=tl.float16 if HALF else tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    bits = (((words >> (4 * PLANE)) & 15) | (0x6400 if HALF else 0x4300)).to(tl.int16)
    return bits.to(tl.float16 if HALF else tl.bfloat16, bitcast=True)


@jit(do_not_specialize=["num_tokens"])
def dot_kernel(
    x,
    w,
    scales,
    zeros,
    bias,
    out,
    num_rows,
    num_tokens,
    width,
    FORMAT: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    TOKENS: tl.constexpr,
    BY_HAND: tl.constexpr,
):
    """out[t, f] = sum of x[t, k] w[f, k] (+ bias[f]). Columns outside count as 0."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    held = tl.minimum(row, num_rows - 1).to(tl.int64)
    token = tl.arange(0, TOKENS)
    lane = tl.arange(0, STEP)
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    kind = x.dtype.element_ty
    HALF: tl.constexpr = kind == tl.float16
    if FORMAT == INT4:
        num_blocks = (width + 127) // 128
        num_words = num_blocks * 16
        for start in range(0, num_words, STEP):
            word = start + lane
            words = tl.load(w + held[:, None] * num_words + word[None, :], mask=(word < num_words)[None, :], other=0)
            block = tl.minimum(word // 16, num_blocks - 1)
            group = held[:, None] * (num_blocks * PER_BLOCK) + (block * PER_BLOCK)[None, :]
            for part in tl.static_range(PER_BLOCK):
                # Differences of small integers are exact in 16 bits; the product with the scale is rounded once.
                scale = tl.load(scales + group + part).to(kind)
                zero = tl.full([ROWS, STEP], 8.0, kind)
                if ZEROS:
                    zero = tl.load(zeros + group + part).to(kind)
                zero += 1024.0 if HALF else 128.0
                for plane in tl.static_range(part * 8 // PER_BLOCK, (part + 1) * 8 // PER_BLOCK):
                    column = word // 16 * 128 + plane * 16 + word % 16
                    weight = (_plane(words, plane, HALF, BY_HAND) - zero) * scale
                    acc = tl.dot(weight, _tokens(x, token, column, num_tokens, width), acc)
    else:
        for start in range(0, width, STEP):
            column = start + lane
            codes = tl.load(w + held[:, None] * width + column[None, :], mask=(column < width)[None, :], other=0)
            if FORMAT == FP8:
                # Sign, exponent and mantissa where bfloat16 has them, the exponent 120 too small.
                bits = ((codes.to(tl.int16) << 8) >> 4) & -30736  # 0x87F0
                weight = (bits.to(tl.bfloat16, bitcast=True).to(tl.float32) * 2.0**120).to(kind)
            else:
                weight = codes.to(kind)
            acc = tl.dot(weight, _tokens(x, token, column, num_tokens, width), acc)
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
        quick(dot_kernel)[(ceil_div(num_rows, rows),)](
            x_TD,
            weight,
            out_TF if scales is None else scales,
            out_TF if zeros is None else zeros,
            out_TF if bias_F is None else bias_F,
            out_TF,
            num_rows,
            num_tokens,
            x_TD.shape[1],
            FORMAT=format_id,
            PER_BLOCK=per_block,
            ZEROS=zeros is not None,
            BIAS=bias_F is not None,
            ROWS=rows,
            STEP=step,
            TOKENS=max(16, triton.next_power_of_2(num_tokens)),
            BY_HAND=x_TD.device.type != "cpu",  # Triton's interpreter has no assembler
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )
